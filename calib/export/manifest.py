# SPDX-License-Identifier: Apache-2.0
"""Writing and reading `calib_export.json`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from calib import __version__
from calib.errors import ArtifactError
from calib.export.formats import Format
from calib.export.request import ExportRequest, ExportSummary
from calib.models.hashing import sha256_of_file
from calib.schema.export import ExportManifest
from calib.schema.provenance import Producer

__all__ = ["MANIFEST", "changed_files", "read_manifest", "write_manifest"]

MANIFEST = "calib_export.json"


def write_manifest(found: Format, request: ExportRequest, summary: ExportSummary) -> ExportManifest:
    """Describes a folder that is otherwise complete."""
    model = request.scales.model
    manifest = ExportManifest(
        producer=Producer(version=__version__),
        to=found.name,
        variant=request.variant,
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        tokenizer_sha256=model.tokenizer_sha256,
        dtype=model.dtype,
        quantized=summary.quantized,
        in_float=summary.in_float,
        kv_cache=summary.kv_cache,
        notes=summary.notes,
        files={path.name: sha256_of_file(path) for path in sorted(request.folder.iterdir()) if path.is_file()},
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    (request.folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> ExportManifest | None:
    """The record of a folder; None if it has none, for it was written by another program.

    Raises:
        ArtifactError: it is damaged, or of an unknown major version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = ExportManifest.model_validate(json.loads(path.read_text(encoding="utf-8")), strict=True)
    except (ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path}: is damaged ({reason}); export again") from None
    if manifest.version.partition(".")[0] != "1":
        raise ArtifactError(f"{path}: has version {manifest.version}, this calib reads 1.0; update calib")
    return manifest


def changed_files(folder: Path, manifest: ExportManifest) -> dict[str, str]:
    """Files that are not as they were written -> what is wrong with them."""
    found = {}
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found[name] = "is missing"
        elif sha256_of_file(path) != digest:
            found[name] = "has changed since it was exported"
    return found
