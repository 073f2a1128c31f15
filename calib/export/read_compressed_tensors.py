# SPDX-License-Identifier: Apache-2.0
"""Reads a compressed-tensors W8A8 checkpoint, ours or that of llm-compressor, and says all that is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import ArtifactError
from calib.export.cached import CACHED_PROJECTIONS
from calib.export.safetensors_folder import SafetensorsFolder
from calib.models.quiet import quiet_transformers

__all__ = ["CompressedCheckpoint", "CompressedLinear", "has_cache", "read_compressed_tensors"]

SUFFIXES = ("weight_scale", "input_scale", "input_zero_point", "weight_zero_point", "k_scale", "v_scale")
"""Last parts of the names that the format adds to a checkpoint; a model may have a `logit_scale` of its own."""
SMALLEST = 2.0**-126


@dataclass(frozen=True, eq=False)
class CompressedLinear:
    """One quantized linear layer.

    Attributes:
        codes: int8 or float8_e4m3fn ``[out, in]``.
        weight_scale: float32 ``[out, 1]``.
        input_scale: of a static input.
        input_zero_point: 0 if symmetric.
    """

    codes: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: float
    input_zero_point: int


@dataclass(eq=False)
class CompressedCheckpoint:
    """What a checkpoint says.

    Attributes:
        folder: of it.
        config: `config.json`.
        floating: FP8 instead of INT8.
        symmetric: of inputs.
        ignored: patterns of modules in float.
        linears: by module; only whole and valid ones.
        kv: attention module -> key scale, value scale: float32 ``[1]``, or ``[heads, 1, 1]``.
        kv_heads: keys and values have one scale per head.
        transforms: its `transform_config`.
        model: the architecture on the meta device, without weights.
        expected: how many scales should be there.
        found: how many are there and valid.
        problems: one line each.
    """

    folder: Path
    config: dict[str, Any]
    floating: bool = False
    symmetric: bool = True
    ignored: list[str] = field(default_factory=list)
    linears: dict[str, CompressedLinear] = field(default_factory=dict)
    kv: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    kv_heads: bool = False
    transforms: dict[str, Any] | None = None
    model: nn.Module | None = None
    expected: int = 0
    found: int = 0
    problems: list[str] = field(default_factory=list)


def read_compressed_tensors(folder: Path) -> CompressedCheckpoint:
    """Reads and checks every tensor.

    Raises:
        ArtifactError: `config.json` is missing, or says that this is another format.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = config["quantization_config"]
        assert isinstance(quantization, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ArtifactError(f"{folder}: config.json has no quantization_config; export again") from None
    if quantization.get("quant_method") != "compressed-tensors":
        raise ArtifactError(f"{folder}: quant_method is not compressed-tensors; pass another folder")
    read = CompressedCheckpoint(folder, config)
    try:
        kv = _read_scheme(read, quantization)
    except (AttributeError, TypeError, re.error) as error:  # another type, or pattern, than the format has there
        raise ArtifactError(f"{folder}: its quantization_config is damaged ({error}); export again") from error
    tensors = SafetensorsFolder(folder)
    read.problems += tensors.problems
    read.model = _architecture(read)
    expected: set[str] = set()
    if read.model is not None:
        for name, module in read.model.named_modules():
            if isinstance(module, nn.Linear) and not _ignored(name, read.ignored):
                expected |= _read_linear(read, tensors, name, module)
            elif kv and has_cache(read.model, module):
                expected |= _read_kv(read, tensors, name)
        read.problems += _other_parameters(read.model, tensors, expected)
    unknown = [n for n in tensors.names if n.rpartition(".")[2] in SUFFIXES and n not in expected]
    read.problems += [f"{name}: no layer that is quantized reads it" for name in unknown]
    return read


def _read_scheme(read: CompressedCheckpoint, quantization: dict[str, Any]) -> bool:
    """Reads the scheme; returns whether keys and values have scales."""
    ignored = quantization.get("ignore") or []
    if not isinstance(ignored, list):
        raise TypeError("ignore is no list")
    read.ignored = [str(pattern) for pattern in ignored]
    for pattern in read.ignored:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    groups = list((quantization.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise ArtifactError(f"{read.folder}: has {len(groups)} groups of layers; only one group W8A8 is read here")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations") or {}
    if groups[0].get("targets") != ["Linear"]:
        read.problems.append(f"config.json: targets are {groups[0].get('targets')}, expected Linear")
    for what, scheme, strategy in (("weights", weights, "channel"), ("input_activations", inputs, "tensor")):
        if (scheme.get("num_bits"), scheme.get("strategy"), bool(scheme.get("dynamic"))) != (8, strategy, False):
            raise ArtifactError(f"{read.folder}: {what} are not static 8 bits per {strategy}; only these are read here")
    read.floating = inputs.get("type") == "float"
    read.symmetric = bool(inputs.get("symmetric", True))
    wanted = "float-quantized" if read.floating else "int-quantized"
    if quantization.get("format") != wanted or weights.get("type") != inputs.get("type"):
        read.problems.append(f"config.json: format is {quantization.get('format')}, its scheme is {wanted}")
    read.transforms = quantization.get("transform_config") or None
    kv = quantization.get("kv_cache_scheme")
    read.kv_heads = isinstance(kv, dict) and kv.get("strategy") == "attn_head"
    return kv is not None


def _architecture(read: CompressedCheckpoint) -> nn.Module | None:
    """The model's modules, without memory."""
    import transformers

    try:
        with quiet_transformers():  # the class of a model imports what warns
            config = transformers.AutoConfig.from_pretrained(read.folder)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            cls = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            with torch.device("meta"):
                model: nn.Module = cls(config)
    except Exception as error:  # any model class may fail in its own way
        read.problems.append(f"config.json: its model cannot be built ({' '.join(str(error).split())[:200]})")
        return None
    return model


def _ignored(name: str, patterns: list[str]) -> bool:
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def has_cache(model: nn.Module, module: nn.Module) -> bool:
    """Whether compressed-tensors gives a module of a model `k_scale` and `v_scale`.

    Source: `is_cached_attention_module`; and it stops where a configuration has no `num_key_value_heads` (OPT, BART).
    """
    import inspect

    whole: Any = model
    if not hasattr(whole.config.get_text_config(decoder=True), "num_key_value_heads"):
        return False
    if "attention" not in type(module).__name__.lower():
        return False
    if not any(hasattr(module, name) for name in CACHED_PROJECTIONS):
        return False
    return not {"past_key_value", "past_key_values"}.isdisjoint(inspect.signature(module.forward).parameters)


def _read_linear(read: CompressedCheckpoint, tensors: SafetensorsFolder, name: str, module: nn.Linear) -> set[str]:
    keys = [f"{name}.weight", f"{name}.weight_scale", f"{name}.input_scale"]
    dtype = torch.float8_e4m3fn if read.floating else torch.int8
    rows, columns = module.out_features, module.in_features
    wanted: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (dtype, (rows, columns)),
        (torch.float32, (rows, 1)),
        (torch.float32, (1,)),
    ]
    if not read.symmetric:
        keys.append(f"{name}.input_zero_point")
        wanted.append((torch.int8, (1,)))
    read.expected += len(keys) - 1
    values = [_valid(read, tensors, key, *shape) for key, shape in zip(keys, wanted, strict=True)]
    read.found += sum(value is not None for value in values[1:])
    codes, weight_scale, input_scale, *zero = values
    if codes is not None and weight_scale is not None and input_scale is not None and None not in zero:
        point = int(zero[0].item()) if zero and zero[0] is not None else 0
        read.linears[name] = CompressedLinear(codes, weight_scale, float(input_scale.item()), point)
    return set(keys)


def _read_kv(read: CompressedCheckpoint, tensors: SafetensorsFolder, name: str) -> set[str]:
    keys = [f"{name}.k_scale", f"{name}.v_scale"]
    read.expected += len(keys)
    shape = (_heads(read.model, name), 1, 1) if read.kv_heads else (1,)
    values = [_valid(read, tensors, key, torch.float32, shape) for key in keys]
    read.found += sum(value is not None for value in values)
    key, value = values
    if key is not None and value is not None:
        read.kv[name] = (key, value)
    return set(keys)


def _heads(model: nn.Module | None, name: str) -> int:
    """Heads of the keys of an attention module, as compressed-tensors counts them: from the configuration."""
    assert model is not None
    whole: Any = model
    config = getattr(model.get_submodule(name), "config", None) or whole.config.get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _valid(
    read: CompressedCheckpoint, tensors: SafetensorsFolder, key: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """A tensor that is as it must be, or None and a problem."""
    if key not in tensors:
        read.problems.append(f"{key}: is missing")
        return None
    tensor = tensors.tensor(key)
    if tensor.dtype != dtype:
        read.problems.append(f"{key}: is {str(tensor.dtype)[6:]}, must be {str(dtype)[6:]}")
        return None
    if tuple(tensor.shape) != shape:
        read.problems.append(f"{key}: has shape {list(tensor.shape)}, must be {list(shape)}")
        return None
    if key.endswith("_scale"):
        bad = ~(tensor.isfinite() & (tensor >= SMALLEST))
        if bad.any():
            read.problems.append(f"{key}: holds {tensor[bad].reshape(-1)[0].item()}, no usable scale")
            return None
    elif tensor.is_floating_point() and tensor.float().isnan().any():
        read.problems.append(f"{key}: holds NaN")
        return None
    return tensor


def _other_parameters(model: nn.Module, tensors: SafetensorsFolder, expected: set[str]) -> Iterator[str]:
    """Parameters in float that are missing, of another shape, or not finite."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or [])
    for name, parameter in model.named_parameters():
        if name in expected or (name in tied and name not in tensors):
            continue
        if name not in tensors:
            yield f"{name}: is missing"
            continue
        tensor = tensors.tensor(name)
        if tensor.shape != parameter.shape:
            yield f"{name}: has shape {list(tensor.shape)}, must be {list(parameter.shape)}"
        elif not tensor.is_floating_point():
            yield f"{name}: is {str(tensor.dtype)[6:]} and its layer is not quantized"
        elif not tensor.isfinite().all():
            yield f"{name}: holds NaN or infinite values"
