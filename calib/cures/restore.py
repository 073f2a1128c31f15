# SPDX-License-Identifier: Apache-2.0
"""`restore_cures`: the cured model again, from its parent checkpoint and what was recorded of the cures."""

from __future__ import annotations

from pathlib import Path

from calib.cures.offline import OfflineRotation
from calib.cures.record import load_smoothing, smoothing_record
from calib.cures.rotate import OnlineRotation
from calib.cures.scale import OnlineScaling
from calib.errors import ArtifactError
from calib.models import OpenedModel
from calib.quantized import QuantizedWeight
from calib.quantized.rounded_file import ROUNDED_FILE, load_rounded
from calib.schema.scales import CureRecord, ScaleFile

__all__ = ["SMOOTHING_FILE", "restore_cures", "rounded_digests", "rounded_weights"]

SMOOTHING_FILE = "smoothing.safetensors"


def restore_cures(opened: OpenedModel, scales: ScaleFile, folder: Path) -> OpenedModel:
    """Applies the cures of a scale file to the float model in place: smoothing, rotation, scaling of inputs.

    The result computes the same function in float. What is computed online is done by hooks that stay on the model. A
    prefix, rounded weights and layers in float change nothing here.

    Args:
        opened: the checkpoint that the cures were found for.
        scales: of the cured model; its provenance names this checkpoint as parent.
        folder: that holds `smoothing.safetensors` if there is smoothing.

    Returns:
        The model with the provenance of the cured one, that of the scale file; itself if the scales are its own.

    Raises:
        ArtifactError: the scales are of another model, or a file is missing or not the one that was recorded.
        ModelError, UsageError: a cure does not fit the model.
    """
    if scales.model.fingerprint == opened.provenance.fingerprint:
        return opened
    # ranges that are clipped change no model, and were chosen after it was measured
    cured = opened.cured([record.model_dump_json() for record in scales.cures if record.kind != "clip"])
    if cured.provenance.fingerprint != scales.model.fingerprint:
        raise ArtifactError(
            f"{opened.provenance.name}: the scales are of another model, {scales.model.name}; "
            "pass the checkpoint that was measured or cured"
        )
    for record in scales.cures:
        if record.kind == "smooth":
            smoothing = load_smoothing(folder / SMOOTHING_FILE)
            if smoothing_record(smoothing).settings["scales_sha256"] != record.settings.get("scales_sha256"):
                raise ArtifactError(f"{folder / SMOOTHING_FILE}: is not the smoothing of these scales; quantize again")
            smoothing.apply(opened.model)
        elif record.kind == "rotate":
            _rotation(opened, record).apply(opened.model)
        elif record.kind == "scale":
            OnlineScaling.of(opened.model, record).apply(opened.model)
    return cured


def rounded_digests(scales: ScaleFile) -> dict[str, str]:
    """Module -> hash of its weight, where that was rounded with error compensation; see `rounded_sha256`."""
    held = next((cure.settings.get("rounded_sha256") for cure in scales.cures if cure.kind == "compensate"), None)
    return {name: str(digest) for name, digest in held.items()} if isinstance(held, dict) else {}


def rounded_weights(scales: ScaleFile, folder: Path) -> dict[str, QuantizedWeight] | None:
    """Weights that were rounded with error compensation; None if there are none.

    Raises:
        ArtifactError: their file is missing, damaged, or not the one that was recorded: others are not taken for them.
    """
    digests = rounded_digests(scales)
    return load_rounded(folder / ROUNDED_FILE, digests) if digests else None


def _rotation(opened: OpenedModel, record: CureRecord) -> OnlineRotation | OfflineRotation:
    settings = record.settings
    if settings.get("where") == "weights" and {"residual", "heads", "signs_seed", "untied"} <= settings.keys():
        return OfflineRotation.of_record(opened.model, record)
    modules, block, seed = settings.get("modules"), settings.get("largest_block"), settings.get("signs_seed")
    if settings.get("where") != "input" or not isinstance(modules, list) or not isinstance(block, int):
        raise ArtifactError("cure rotate: its record is of no rotation of weights or inputs; quantize again")
    return OnlineRotation(tuple(str(name) for name in modules), block, seed if isinstance(seed, int) else None)
