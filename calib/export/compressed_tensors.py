# SPDX-License-Identifier: Apache-2.0
"""A static W8A8 checkpoint in the compressed-tensors format, INT8 or FP8, as vLLM and transformers read it.

The format derives a scale from a range as amax / 127.5 (symmetric, grid -128..127), (max - min) / 255 or amax / 448
(FP8 E4M3), not as amax / 127, so scales are derived here from the ranges of `scales.json`. Weights have one scale per
output row. Shapes that both consumers accept: ``[1]`` for inputs, keys and values, ``[heads, 1, 1]`` for keys and
values per head, ``[out, 1]`` for weights; float32, for a scale in bfloat16 flips roundings. Source: compressed-tensors
0.20, `quantization/utils/helpers.py` (`calculate_qparams`) and `quantization/lifecycle/initialize.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import ArtifactError, ModelError, UsageError
from calib.export.cached import cached_ranges
from calib.export.checkpoint import copy_companions, read_config, save_weights, write_config
from calib.export.formats import FORMATS, register
from calib.export.linears import AttentionRange, LinearRange, Linears, linear_ranges
from calib.export.request import ExportRequest, ExportSummary
from calib.export.transform_config import transform_config, transform_tensors
from calib.models import OpenedModel
from calib.quantized import QuantizedWeight
from calib.quantized.fake_quantize import round_float8
from calib.scales.float8 import FLOAT8_MAX
from calib.schema.scales import ScaleFile

__all__ = [
    "CheckpointSummary",
    "export_compressed_tensors",
    "holds_online",
    "kv_scales",
    "weight_codes",
    "why_no_checkpoint",
    "write_checkpoint",
]

_BLACKWELL = "vLLM has no INT8 W8A8 kernel for NVIDIA Blackwell (SM 10.0); use the fp8 variant there"
_MOE = "vLLM computes INT8 mixture-of-experts layers with dynamic scales only; static scales of experts are not used"
_HEADS = "vLLM takes one scale per head of keys and values with FlashAttention only; transformers takes them always"
_SGLANG = "SGLang 0.5 cannot load static INT8 scales of fused layers; use the fp8 variant there"
_AMX = (
    "vLLM on a CPU with AMX quantizes each token of symmetric inputs itself, in bfloat16 only; asymmetric scales are "
    "used as they are written"
)
_TRANSFORMS = (
    "the inputs of some layers are rotated (transform_config): vLLM computes that on CUDA, without tensor parallelism; "
    "transformers up to 5.23 ignores it, loads, and computes something else"
)


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds.

    Attributes:
        quantized: modules in 8 bits.
        in_float: modules left in floating point -> the reason.
    """

    quantized: list[str]
    in_float: dict[str, str]


def write_checkpoint(
    opened: OpenedModel,
    scales: ScaleFile,
    folder: Path,
    weights: Mapping[str, QuantizedWeight] | None = None,
) -> CheckpointSummary:
    """Writes an INT8 checkpoint into an existing folder.

    Args:
        opened: the model that was measured.
        scales: of it.
        folder: exists.
        weights: rounded before, on this format's grid (amax / 127.5 per row); all others are rounded to nearest.

    Raises:
        UsageError: the scales are not 8-bit and per tensor.
        ModelError: no linear layer of the model has a scale.
        ArtifactError: the scales are of another model, need an operation that no checkpoint holds, or the disk is full.
    """
    if not holds_online(scales):
        raise ArtifactError(
            f"{scales.model.name}: its cures need an operation that no checkpoint holds; choose scales without it"
        )
    if scales.model.fingerprint != opened.provenance.fingerprint:
        raise ArtifactError(
            f"{opened.provenance.name}: the scales are of another model, {scales.model.name}; measure this one"
        )
    summary = export_compressed_tensors(ExportRequest(scales, folder, opened, variant="int8", weights=weights or {}))
    return CheckpointSummary(summary.quantized, summary.in_float)


def why_no_checkpoint(scales: ScaleFile, model: nn.Module) -> str | None:
    """Why no checkpoint can hold scales of a model, with what to do; None if one can."""
    if scales.bits != 8:
        return f"it takes 8 bits, not {scales.bits}"
    if not holds_online(scales):
        return "a cure needs an operation that it cannot name; `calib export --to onnx-qdq` holds that"
    try:
        _require_own_modules(model)
        linear_ranges(scales, model)
    except ModelError as error:
        return str(error)
    return None


def _require_own_modules(model: nn.Module) -> None:
    """Refuses modules that transformers builds otherwise where it loads this format: no weights find their place there.

    Source: transformers 5.23, `HfQuantizer._convert_model_for_quantization` (experts of Llama 4).

    Raises:
        ModelError: the model has one.
    """
    from transformers.quantizers import base

    patched: dict[str, Any] = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    for module in model.modules():
        found = patched.get(type(module).__name__)
        if found is not None and "compressed-tensors" in found["quantization_methods"]:
            raise ModelError(
                f"checkpoint: transformers replaces {type(module).__name__} where it loads compressed-tensors, and no "
                "weights fit; use the scales in scales.json, or another format"
            )


def holds_online(scales: ScaleFile) -> bool:
    """Whether a checkpoint can say all that its reader must compute beyond loading it."""
    held = FORMATS["compressed-tensors"].cures
    return all(cure.needs != "online-op" or cure.name in held for cure in scales.cures)


@register(
    "compressed-tensors",
    summary="checkpoint with static W8A8 weights and scales",
    carries="weights, input scales, key and value scales, what stays in float",
    consumers=("vLLM", "transformers", "SGLang (fp8)"),
    proven="transformers, bit for bit; vLLM; llm-compressor",
    cures=("smooth", "rotate", "rotate-online", "keep", "clip", "compensate"),
    variants=("int8", "fp8"),
    kv_heads=True,
    model=True,
)
def export_compressed_tensors(request: ExportRequest) -> ExportSummary:
    """Writes weights, configuration and tokenizer.

    Raises:
        UsageError: the scales are not 8-bit.
        ModelError: no linear layer has a scale, no attention has scales of keys and values, or transformers would build
            other modules than the model's where it loads them.
    """
    opened, scales, floating = request.opened, request.scales, request.variant == "fp8"
    if scales.bits != 8:
        raise UsageError(f"checkpoint: --bits {scales.bits} has no checkpoint format here; only 8 has")
    _require_own_modules(opened.model)
    linears = linear_ranges(scales, opened.model)
    attention = cached_ranges(request) if request.kv_cache else {}
    if request.kv_heads:
        _require_heads(attention)
    symmetric = floating or all(found.symmetric for found in linears.ranges.values())
    state = {name: tensor.detach().cpu() for name, tensor in opened.model.state_dict().items()}
    of_one_scale = per_tensor_weights(scales)
    for name, found in linears.ranges.items():
        rounded = None if floating else request.weights.get(name)
        if rounded is None:
            codes, scale = weight_codes(state[f"{name}.weight"], floating=floating, per_tensor=name in of_one_scale)
        else:
            codes, scale = rounded.codes, rounded.scale.reshape(-1, 1).expand(len(rounded.codes), 1).clone()
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = codes, scale
        state |= _input_tensors(found, symmetric=symmetric, floating=floating)
    for name, kv in attention.items():
        for part, whole, heads in (("k", kv.key, kv.key_heads), ("v", kv.value, kv.value_heads)):
            state[f"{name}.{part}_scale"] = kv_scales(heads, per_head=True) if request.kv_heads else kv_scales([whole])
    transforms = transform_config(scales, opened.model)
    save_weights(state | transform_tensors(transforms), request.folder, request.shard_size)
    config = read_config(opened)
    ignore = sorted(linears.in_float)
    config["quantization_config"] = _quantization(
        ignore, symmetric=symmetric, floating=floating, kv=_kv_strategy(request, attention)
    )
    if transforms is not None:
        config["quantization_config"]["transform_config"] = transforms
    write_config(config, request.folder)
    copy_companions(opened, request.folder)
    notes = [*linears.notes, *([] if floating else _warnings(linears, symmetric=symmetric))]
    notes += [_HEADS] if request.kv_heads else []
    notes += [] if transforms is None else [_TRANSFORMS]
    return ExportSummary(list(linears.ranges), linears.in_float, list(attention), notes)


def per_tensor_weights(scales: ScaleFile) -> set[str]:
    """Layers whose weights have one scale in the file; a checkpoint repeats it in every row, which all readers take."""
    return {
        reader.removesuffix(":weight")
        for name, tensor in scales.tensors.items()
        if tensor.scheme.granularity == "per-tensor"
        for reader in (name, *tensor.shared_with)
        if reader.endswith(":weight")
    }


def weight_codes(
    weight: torch.Tensor, *, floating: bool = False, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 or float8_e4m3fn ``[out, in]`` and scales float32 ``[out, 1]`` of a weight.

    A row of zeros gets the step that compressed-tensors takes there; `per_tensor` gives all rows one scale.
    """
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True) / (FLOAT8_MAX if floating else 127.5)
    if per_tensor:
        scale = scale.amax().expand(len(values), 1).clone()
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    if floating:
        return round_float8(values / scale).to(torch.float8_e4m3fn), scale
    return torch.round(torch.clamp(values / scale, -128, 127)).to(torch.int8), scale


def _input_tensors(found: LinearRange, *, symmetric: bool, floating: bool) -> dict[str, torch.Tensor]:
    name = found.module
    if floating:
        return {f"{name}.input_scale": _one(found.symmetric_scale(FLOAT8_MAX))}
    if symmetric:
        return {f"{name}.input_scale": _one(found.symmetric_scale(127.5))}
    step, zero = (found.symmetric_scale(127.5), 0) if found.symmetric else found.asymmetric_grid()
    return {f"{name}.input_scale": _one(step), f"{name}.input_zero_point": torch.tensor([zero], dtype=torch.int8)}


def _one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def kv_scales(amax: Sequence[float], *, per_head: bool = False) -> torch.Tensor:
    """FP8 scales of keys or values, float32: ``[1]``, or ``[heads, 1, 1]`` per head."""
    scales = torch.tensor([value / FLOAT8_MAX for value in amax], dtype=torch.float32)
    return scales.reshape(-1, 1, 1) if per_head else scales


def _kv_strategy(request: ExportRequest, attention: Mapping[str, AttentionRange]) -> str | None:
    if not attention:
        return None
    return "attn_head" if request.kv_heads else "tensor"


def _require_heads(attention: Mapping[str, AttentionRange]) -> None:
    for name, kv in attention.items():
        if not (kv.key_heads and kv.value_heads):
            raise ModelError(
                f"{name}: the scale file has no ranges of its heads; measure with --statistics full and choose scales "
                "anew, or export with --kv-cache"
            )


def _quantization(ignore: list[str], *, symmetric: bool, floating: bool, kv: str | None) -> dict[str, Any]:
    grid: dict[str, Any] = {"num_bits": 8, "type": "float" if floating else "int", "dynamic": False}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if floating else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**grid, "symmetric": True, "strategy": "channel"},
                "input_activations": {**grid, "symmetric": symmetric, "strategy": "tensor"},
                "output_activations": None,
            }
        },
    }
    if kv is not None:
        config["kv_cache_scheme"] = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": kv,
            "dynamic": False,
        }
    return config


def _warnings(linears: Linears, *, symmetric: bool) -> list[str]:
    experts = any(".experts." in name for name in linears.ranges)
    return [_BLACKWELL, _SGLANG, *([_AMX] if symmetric else []), *([_MOE] if experts else [])]
