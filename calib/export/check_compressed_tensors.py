# SPDX-License-Identifier: Apache-2.0
"""Checks a compressed-tensors checkpoint against its scale file, and runs it in transformers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calib.cures.restore import rounded_digests
from calib.errors import ModelError
from calib.export.checks import checks, consumer
from calib.export.compare import first_output, largest_difference
from calib.export.compressed_tensors import kv_scales
from calib.export.emulate import compressed_tensors_plan, compute_transforms, float_model
from calib.export.linears import FUSED, AttentionRange, attention_ranges, linear_ranges
from calib.export.read_compressed_tensors import CompressedCheckpoint, read_compressed_tensors
from calib.export.report import ConsumerReport, Verification
from calib.export.transform_config import transform_config
from calib.export.trial_inputs import trial_inputs
from calib.models.checkpoint import read_checkpoint
from calib.models.provenance import tokenizer_sha256
from calib.models.quiet import quiet_transformers
from calib.quantized import QuantizedModel
from calib.quantized.rounded_file import rounded_sha256
from calib.scales.float8 import FLOAT8_MAX
from calib.schema.export import ExportManifest
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = ["check_compressed_tensors"]


@checks("compressed-tensors")
def check_compressed_tensors(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every tensor, every name, fused siblings, and, with a scale file, every value."""
    read = read_compressed_tensors(folder)
    found = Verification("compressed-tensors", read.found, read.expected, list(read.problems))
    found.problems += _unequal_siblings(read)
    if manifest is not None:
        found.problems += _against_manifest(read, manifest)
    if scales is not None:
        found.problems += _against_scales(read, scales)
    return found


@consumer(
    "transformers",
    formats=("compressed-tensors",),
    packages=("transformers", "compressed_tensors"),
    install="pip install 'transformers>=5.6' compressed-tensors",
)
def run_transformers(
    folder: Path, manifest: ExportManifest | None = None, model: OpenedModel | None = None
) -> ConsumerReport:
    """Loads a checkpoint with transformers and compares it, bit for bit, with calib's quantized model.

    transformers multiplies rounded values in floating point: it proves what is computed, not how fast.
    """
    read = read_compressed_tensors(folder)
    # compressed-tensors draws progress bars that no setting turns off
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        reference = float_model(read)
        cls: Any = type(reference)
        loaded = cls.from_pretrained(folder, dtype="float32").eval()
        compute_transforms(read, loaded)
    inputs = trial_inputs(reference)
    plan = compressed_tensors_plan(read)
    with torch.no_grad(), redirect_stderr(io.StringIO()):
        theirs = first_output(loaded(**inputs))
        with QuantizedModel(reference, plan):
            ours = first_output(reference(**inputs))
            exact, worst = _layers(reference, loaded, read)
    states = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    held = [_same(states, f"{name}.input_scale", linear.input_scale) for name, linear in read.linears.items()]
    held += [_same(states, f"{name}.{part}_scale", value) for name, pair in read.kv.items()
             for part, value in zip("kv", pair, strict=True)]  # fmt: skip
    return ConsumerReport(
        consumer=f"transformers {version('transformers')} with compressed-tensors {version('compressed-tensors')}",
        scales_read=sum(held),
        scales=len(held),
        layers_exact=exact,
        layers=len(read.linears),
        layer_difference=worst,
        model_difference=largest_difference(theirs, ours),
        allowance=0.0,
    )


def _layers(reference: nn.Module, loaded: nn.Module, read: CompressedCheckpoint) -> tuple[int, float]:
    exact, worst = 0, 0.0
    generator = torch.Generator().manual_seed(0)
    for name, linear in read.linears.items():
        x = torch.randn(4, linear.codes.shape[1], generator=generator) * (linear.input_scale * 60)
        difference = largest_difference(loaded.get_submodule(name)(x), reference.get_submodule(name)(x))
        exact, worst = exact + (difference == 0), max(worst, difference)
    return exact, worst


def _same(states: dict[str, torch.Tensor], name: str, value: float | torch.Tensor) -> bool:
    wanted = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    return name in states and torch.equal(states[name].detach().float().reshape(-1), wanted)


def _unequal_siblings(read: CompressedCheckpoint) -> Iterator[str]:
    for parent in sorted({name.rpartition(".")[0] for name in read.linears}):
        for group in FUSED:
            held = {p: read.linears[f"{parent}.{p}"] for p in group if f"{parent}.{p}" in read.linears}
            if len({(linear.input_scale, linear.input_zero_point) for linear in held.values()}) > 1:
                yield f"{parent}: {', '.join(held)} are multiplied as one and have unequal scales"
            outside = [p for p in group if f"{parent}.{p}" in read.ignored]
            if held and outside:
                yield f"{parent}: {', '.join(outside)} is in float, and {', '.join(held)} beside it is not"


def _against_manifest(read: CompressedCheckpoint, manifest: ExportManifest) -> Iterator[str]:
    if set(read.ignored) != set(manifest.in_float):
        names = sorted(set(read.ignored) ^ set(manifest.in_float))
        yield f"config.json: ignore and the reasons of the export disagree about {', '.join(names)}"
    if read.floating != (manifest.variant == "fp8"):
        yield f"config.json: is not the variant {manifest.variant} that was exported"
    if bool(read.kv) != bool(manifest.kv_cache):
        yield "config.json: kv_cache_scheme is not as it was exported"


def _against_scales(read: CompressedCheckpoint, scales: ScaleFile) -> Iterator[str]:
    architecture = (read.config.get("architectures") or [None])[0]
    if architecture != scales.model.architecture:
        yield f"config.json: is a {architecture}, the scales are of a {scales.model.architecture}"
    if read.config.get("dtype") != scales.model.dtype:
        yield f"config.json: serves in {read.config.get('dtype')}, the scales were measured in {scales.model.dtype}"
    yield from _tokenizer(read, scales)
    if read.model is not None and read.transforms != transform_config(scales, read.model):
        yield "config.json: transform_config is not the rotation that the scale file names"
    try:
        wanted = linear_ranges(scales, read.model)
        kv = attention_ranges(scales) if read.kv else {}
    except ModelError as error:
        yield str(error)
        return
    digests = rounded_digests(scales)
    for name, linear in read.linears.items():
        expected = wanted.ranges.get(name)
        if expected is None:
            yield f"{name}: is quantized, and the scale file says: {wanted.in_float.get(name, 'no such layer')}"
            continue
        if read.floating:
            scale, point = expected.symmetric_scale(FLOAT8_MAX), 0
        elif expected.symmetric:
            scale, point = expected.symmetric_scale(127.5), 0
        else:
            scale, point = expected.asymmetric_grid()
        if (linear.input_scale, linear.input_zero_point) != (scale, point):
            yield (
                f"{name}.input_scale: is {linear.input_scale:.9g} (zero point {linear.input_zero_point}), "
                f"the scale file gives {scale:.9g} ({point})"
            )
        if name not in digests:
            yield from _nearest(read, name)
        elif rounded_sha256(linear.codes, linear.weight_scale) != digests[name]:
            yield f"{name}.weight: is not the one that was rounded with error compensation"
    yield from _keys_and_values(read, kv)


def _keys_and_values(read: CompressedCheckpoint, ranges: dict[str, AttentionRange]) -> Iterator[str]:
    for name, scales in read.kv.items():
        held = ranges.get(name)
        for part, scale in zip(("key", "value"), scales, strict=True):
            amax = () if held is None else getattr(held, f"{part}_heads") if read.kv_heads else (getattr(held, part),)
            if not amax or not torch.equal(scale, kv_scales(amax, per_head=read.kv_heads)):
                shown = ", ".join(f"{float(number):.9g}" for number in scale.reshape(-1)[:4])
                yield f"{name}.{part[0]}_scale: is {shown}, which is not what the scale file gives"


def _nearest(read: CompressedCheckpoint, name: str) -> Iterator[str]:
    """Rounded to nearest, a scale per row spans the row, so the largest code of a row is the last one of the grid."""
    largest = read.linears[name].codes.float().abs().amax(1)
    last = FLOAT8_MAX if read.floating else 127.0
    short = (largest < last) & (largest > 0)
    if short.any():
        row = int(short.nonzero()[0])
        yield f"{name}.weight: codes of row {row} reach {int(largest[row])}, not {int(last)}; they are of another scale"


def _tokenizer(read: CompressedCheckpoint, scales: ScaleFile) -> Iterator[str]:
    if scales.model.tokenizer_sha256 is None:
        return
    try:
        held = tokenizer_sha256(read_checkpoint(read.folder, read.folder.name).tokenizer_files)
    except ModelError as error:
        yield str(error)
        return
    if held != scales.model.tokenizer_sha256:
        yield "tokenizer: is not the one that the model was measured with"
