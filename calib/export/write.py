# SPDX-License-Identifier: Apache-2.0
"""`export_scales`: checks that model, tokenizer, cures and dtype fit the scale file, then has a format written."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calib.cures.restore import SMOOTHING_FILE, restore_cures, rounded_weights
from calib.errors import ArtifactError, GateError, UsageError
from calib.export.formats import Format, parse_format
from calib.export.manifest import write_manifest
from calib.export.request import ExportRequest, ExportSummary
from calib.output import output_folder
from calib.scales.file import save_scales
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.models import OpenedModel
    from calib.quantized import QuantizedWeight

__all__ = ["export_scales", "require_packages"]

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torchao": ("torchao",),
}
"""Extra of calib -> the packages that it brings."""


def export_scales(
    scales: ScaleFile,
    folder: Path,
    model: OpenedModel | None = None,
    *,
    to: str,
    measurement: Measurement | None = None,
    kv_cache: bool = False,
    kv_heads: bool = False,
    shard_size: str = "5GB",
    weights: Mapping[str, QuantizedWeight] | None = None,
    source: Path | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Writes scales in a format that a consumer reads, beside `scales.json` and `calib_export.json`.

    Args:
        scales: what `choose_scales` returned or `load_scales` read.
        folder: to write; it appears whole or not at all.
        model: the model that was measured; formats with weights or graph names need it.
        to: `NAME` or `NAME:VARIANT`, see `calib.export.FORMATS`.
        measurement: that the scales were chosen from; formats with channel statistics need it.
        kv_cache: write scales of keys and values too, where the format has them.
        kv_heads: one of them per head, where the format takes that; elsewhere one per tensor, and a note says so.
        shard_size: of checkpoint files.
        weights: rounded before, with error compensation, on the grid of the format.
        source: folder that `calib quantize --cure` wrote. With it `model` may be the checkpoint that the cures were
            found for, to which they are applied in place, and the weights are those that were rounded then.
        overwrite: replace the folder.

    Raises:
        UsageError: an unknown format, or something that it needs is missing.
        ArtifactError: model or measurement are not those of the scale file, or the format cannot express its cures.
        ModelError: nothing of the model can be exported.
        GateError: the model was measured in another dtype than it would be served in.
    """
    found, variant = parse_format(to)
    require_expressed(found, scales)
    if source is not None and model is not None:
        model, weights = restore_cures(model, scales, source), weights or rounded_weights(scales, source)
    request = ExportRequest(
        scales, folder, model, measurement, variant, kv_cache or kv_heads, kv_heads, shard_size, weights or {}
    )
    require_fit(found, request)
    require_packages(found.extra, found.name)
    with output_folder(folder, overwrite=overwrite) as work:
        request = replace(request, folder=work)
        summary = found.write(request)
        if source is not None and any(cure.kind == "smooth" for cure in scales.cures):
            shutil.copyfile(source / SMOOTHING_FILE, work / SMOOTHING_FILE)
        if kv_heads and not found.kv_heads:
            summary.notes.append(
                f"format {found.name}: has no scales per head; keys and values have one scale per tensor, or none"
            )
        save_scales(scales.model_copy(update={"aliases": {**scales.aliases, **summary.aliases}}), work)
        write_manifest(found, request, summary)
    return summary


def require_expressed(found: Format, scales: ScaleFile) -> None:
    """Refuses cures that a format has no form for."""
    for cure in scales.cures:
        if cure.name not in found.cures:
            raise ArtifactError(
                f"format {found.name}: cannot express the cure {cure.name!r} of the scale file; "
                f"choose a format that can (`calib formats`), or scales without it"
            )


def require_fit(found: Format, request: ExportRequest) -> None:
    """Refuses what does not belong together."""
    scales = request.scales
    if found.model:
        _ = request.opened
    if found.measurement and request.measured.sha256 != scales.measurement_sha256:
        raise ArtifactError(f"{scales.model.name}: the scales were chosen from another measurement; pass that one")
    if any(cure.kind == "compensate" for cure in scales.cures) and not request.weights:
        raise ArtifactError(
            f"{scales.model.name}: its weights were rounded with error compensation, and scales alone do not hold "
            "them; export the folder of `calib quantize`, or choose scales without it"
        )
    if request.model is None:
        return
    given = request.model.provenance
    if scales.model.fingerprint != given.fingerprint:
        raise ArtifactError(f"{given.name}: the scales are of another model, {scales.model.name}; measure this one")
    if scales.model.tokenizer_sha256 not in (None, given.tokenizer_sha256):
        raise ArtifactError(f"{given.name}: its tokenizer is not the one it was measured with; measure again")
    if scales.model.dtype != given.dtype:
        raise GateError(
            f"{given.name}: was measured in {scales.model.dtype} and would be served in {given.dtype}; "
            f"pass --dtype {scales.model.dtype}, or measure in {given.dtype}"
        )


def require_packages(extra: str, what: str) -> None:
    """Checks that the optional dependencies of an extra are installed.

    Raises:
        UsageError: one is not.
    """
    for package in PACKAGES.get(extra, ()):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{what}: needs {package}, which is not installed; run `pip install 'calib[{extra}]'`")
