# SPDX-License-Identifier: Apache-2.0
"""`verify_export`: whether an exported folder holds what it should, and whether its consumer computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from calib.cures.restore import restore_cures
from calib.errors import ArtifactError, CalibError
from calib.export.checks import CHECKS, Consumer, consumer_of
from calib.export.manifest import changed_files, read_manifest
from calib.export.report import Verification
from calib.models.reason import reason
from calib.scales.file import FILE_NAME, load_scales
from calib.schema.export import ExportManifest
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = ["verify_export"]


def verify_export(
    folder: Path, consumer: str | None = None, *, model: OpenedModel | None = None, run: bool = True
) -> Verification:
    """Checks files, names, shapes, dtypes and values of a folder, then loads it in a consumer.

    A folder that another program wrote has no scale file to compare with: then only what the format itself demands is
    checked.

    Args:
        folder: that `calib export` wrote, or a checkpoint of another program.
        consumer: name of the program to run; by default the first that reads the format, if it is installed.
        model: the float model; whole-model outputs of a graph are then compared with calib's quantized model. Cures are
            applied to it in place, if it is the checkpoint that they were found for.
        run: also run the consumer.

    Raises:
        UsageError: the consumer is unknown or does not read this format.
        ArtifactError: the folder is no export, or cannot be read at all.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    to = manifest.to if manifest is not None else _format_of(folder)
    program = consumer_of(to, consumer)
    scales, problems = _scales(folder, manifest)
    found = CHECKS[to](folder, manifest, scales)
    found.problems = [*problems, *found.problems]
    if manifest is not None:
        found.problems += [f"{name}: {what}" for name, what in changed_files(folder, manifest).items()]
    elif scales is None:
        found.not_checked.append(f"values: {folder} has no {FILE_NAME}, so there is nothing to compare them with")
    if not run or not found.passed:
        return found
    if program is None:
        found.not_checked.append(f"execution: no program that reads {to} can be run here")
    elif program.missing:
        found.not_checked.append(f"{program.name}: is not installed; run `{program.install}`")
    else:
        if model is not None and scales is not None:
            model = restore_cures(model, scales, folder)
        _run(found, program, folder, manifest, model)
    return found


def _run(
    found: Verification, program: Consumer, folder: Path, manifest: ExportManifest | None, model: OpenedModel | None
) -> None:
    """Adds what a consumer computes, or why it does not: one that stops is a finding, not the end of the check."""
    try:
        found.consumer = program.run(folder, manifest, model)
    except CalibError:
        raise
    except Exception as error:  # each consumer has its own ways to refuse a model
        found.problems.append(f"{program.name}: cannot load or run it ({type(error).__name__}: {reason(error)})")
    else:
        found.problems += found.consumer.problems


def _scales(folder: Path, manifest: ExportManifest | None) -> tuple[ScaleFile | None, list[str]]:
    if manifest is None and not (folder / FILE_NAME).is_file():
        return None, []
    try:
        scales = load_scales(folder)
    except CalibError as error:
        return None, [str(error)]
    if manifest is None:
        return scales, []
    problems = []
    if scales.model.fingerprint != manifest.model_fingerprint:
        problems.append(
            f"{FILE_NAME}: is of another model, {scales.model.name}, than was exported, {manifest.model_name}"
        )
    if scales.model.dtype != manifest.dtype:
        problems.append(f"{FILE_NAME}: was measured in {scales.model.dtype}, the export is in {manifest.dtype}")
    return scales, problems


def _format_of(folder: Path) -> str:
    """What a folder without a record is."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        method = None
    if method in CHECKS:
        return str(method)
    if any(folder.glob("*.onnx")):
        return "onnx-qdq"
    raise ArtifactError(f"{folder}: is no export that calib can check; pass a folder that `calib export` wrote")
