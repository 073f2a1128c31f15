# SPDX-License-Identifier: Apache-2.0
"""Ranges of linear layers as consumers need them: one per layer, equal in layers that a consumer fuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from calib.errors import ModelError
from calib.scales.grid import Grid
from calib.scales.routers import IN_FLOAT, router_layers
from calib.schema.scales import ScaleFile, TensorScale

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FUSED", "AttentionRange", "LinearRange", "Linears", "attention_ranges", "linear_ranges"]

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
)
"""Layers beside each other that serving stacks multiply as one, with one scale (vLLM's `packed_modules_mapping`): if
their scales differ, the last one loaded silently serves all."""

_HEAD = "the output head stays in floating point"


@dataclass(frozen=True)
class LinearRange:
    """The input of one linear layer.

    Attributes:
        module: its name.
        low: lower end of the range, at most 0.
        high: upper end, at least 0.
        symmetric: whether the grid is.
        weight: the record of its weight, if the file has one.
    """

    module: str
    low: float
    high: float
    symmetric: bool
    weight: TensorScale | None = None

    @property
    def amax(self) -> float:
        """Largest magnitude of the range."""
        return max(-self.low, self.high)

    def symmetric_scale(self, intervals: float) -> float:
        """``amax / intervals`` in float32: 127 (ONNX Runtime, TensorRT), 127.5 (compressed-tensors), 448 (FP8)."""
        return float(np.float32(self.amax) / np.float32(intervals))

    def asymmetric_grid(self, qmin: int = -128, qmax: int = 127) -> tuple[float, int]:
        """``(high - low) / (qmax - qmin)`` in float32, and the code of 0."""
        low, high = np.float32(self.low), np.float32(self.high)
        scale = np.float32((high - low) / np.float32(qmax - qmin))
        point = float(np.rint(np.clip(np.float32(qmin) - low / scale, qmin, qmax)))
        return float(scale), int(point)

    def grid(self) -> tuple[float, int]:
        """Scale and zero point as scales.json and ONNX have them, int8: amax / 127, or (high - low) / 255.

        Raises:
            ModelError: the range is too small for a scale.
        """
        step = Grid(8, self.symmetric).step(self.low, self.high)
        if step is None:
            raise ModelError(f"{self.module}: the range of its input is 0, or nearly so; leave it in float (--ignore)")
        return step.scale, step.zero_point


@dataclass
class Linears:
    """Linear layers of a model.

    Attributes:
        ranges: by module, in model order.
        in_float: modules without a range -> the reason.
        notes: which ranges were unified.
    """

    ranges: dict[str, LinearRange]
    in_float: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AttentionRange:
    """Keys and values of one attention module, after rotary embedding: largest magnitude of each.

    `key_heads`, `value_heads` have that of each head; empty where heads were not seen. A head of zeros has that of all.
    """

    module: str
    key: float
    value: float
    key_heads: tuple[float, ...] = ()
    value_heads: tuple[float, ...] = ()


def linear_ranges(
    scales: ScaleFile, model: nn.Module | None = None, *, fused: bool = True, conv1d: bool = False
) -> Linears:
    """One range per linear layer, or the reason why it has none.

    A layer that is called several times in a pass gets one range over all calls.

    Args:
        scales: the file.
        model: says which modules are linear layers; without it, those with a weight and an input in the file are.
        fused: give layers that consumers fuse (`FUSED`) one range, or leave all of them in float if one is.
        conv1d: count transformers' `Conv1D` too.

    Raises:
        ModelError: no layer has a range.
    """
    readers = {reader: tensor for name, tensor in scales.tensors.items() for reader in [name, *tensor.shared_with]}
    ranges: dict[str, LinearRange] = {}
    in_float: dict[str, str] = {}
    for name, reason in _candidates(scales, model, readers, conv1d=conv1d):
        found = reason or _range(name, readers, scales)
        if isinstance(found, str):
            in_float[name] = found
        else:
            ranges[name] = found
    notes = _unify(ranges, in_float) if fused else []
    if not ranges:
        why = next(iter(in_float.values()), "it has none")
        raise ModelError(
            f"{scales.model.name}: no linear layer has a static scale of its input ({why}); measure linear_input sites"
        )
    return Linears(ranges, in_float, notes)


def attention_ranges(scales: ScaleFile) -> dict[str, AttentionRange]:
    """Ranges of keys and values of every attention module that has both and keeps them in its cache.

    Attention that caches a compressed latent (DeepSeek) has keys and values too, but no reader ever stores those.

    Raises:
        ModelError: none has.
    """
    readers = {reader: tensor for name, tensor in scales.tensors.items() for reader in [name, *tensor.shared_with]}
    found: dict[str, AttentionRange] = {}
    latent = ""
    for name, tensor in readers.items():
        module, _, port = name.rpartition(":")
        other = readers.get(f"{module}:value")
        if port != "key" or other is None:
            continue
        if f"{module}:cache_key" in readers:
            latent = module
            continue
        found[module] = AttentionRange(module, _amax(tensor), _amax(other), _head_amax(tensor), _head_amax(other))
    if not found and latent:
        raise ModelError(
            f"{scales.model.name}: {latent} caches a latent, not the keys and values that the scales would be of; "
            "export without --kv-cache"
        )
    if not found:
        raise ModelError(
            f"{scales.model.name}: the scale file has no keys and values; measure key and value sites, "
            "or export without --kv-cache"
        )
    return found


def _amax(tensor: TensorScale) -> float:
    return max(abs(tensor.range_min), abs(tensor.range_max))


def _head_amax(tensor: TensorScale) -> tuple[float, ...]:
    if tensor.heads is None:
        return ()
    ends = zip(tensor.heads.min, tensor.heads.max, strict=True)
    return tuple(max(abs(low), abs(high)) or _amax(tensor) for low, high in ends)


def _candidates(
    scales: ScaleFile, model: nn.Module | None, readers: dict[str, TensorScale], *, conv1d: bool
) -> Iterator[tuple[str, str | None]]:
    """Names of linear layers, each with the reason why it stays in float, if that is known already."""
    if model is None:
        weights = [n.removesuffix(":weight") for n in readers if n.endswith(":weight")]
        for name in weights:
            if any(reader.partition("#")[0] == f"{name}:input" for reader in readers) or name in scales.ignore:
                yield name, None
        return
    from torch import nn

    from calib.sites.structure import Structure

    structure = Structure.of(model)
    in_float = dict.fromkeys(
        router_layers(structure.routers, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]), IN_FLOAT
    )
    if structure.head is not None:
        in_float[structure.head] = _HEAD
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if isinstance(module, nn.Linear) or (conv1d and transposed):
            yield name, in_float.get(name)
        elif transposed:
            yield name, "a Conv1D, which the consumer does not quantize"


def _range(name: str, readers: dict[str, TensorScale], scales: ScaleFile) -> LinearRange | str:
    if name in scales.ignore:
        return "the scale file leaves it in float"
    tensors = [t for reader, t in readers.items() if reader.partition("#")[0] == f"{name}:input"]
    if not tensors:
        return "its input was not measured, or was zero"
    for tensor in tensors:
        if tensor.scheme.granularity != "per-tensor":
            return f"its input has a {tensor.scheme.granularity} scale"
        if tensor.scheme.dynamic:
            return "its input has a dynamic scale"
    low = min(*(t.range_min for t in tensors), 0.0)
    high = max(*(t.range_max for t in tensors), 0.0)
    symmetric = all(tensor.scheme.symmetric for tensor in tensors)
    return LinearRange(name, low, high, symmetric, readers.get(f"{name}:weight"))


def _unify(ranges: dict[str, LinearRange], in_float: dict[str, str]) -> list[str]:
    """Gives fused layers one range, in place; returns what changed."""
    notes = []
    parents = {name.rpartition(".")[0] for name in [*ranges, *in_float]}
    for parent in sorted(parents):
        for group in FUSED:
            names = [f"{parent}.{part}" if parent else part for part in group]
            present = [name for name in names if name in ranges or name in in_float]
            if len(present) < 2:
                continue
            outside = [name for name in present if name in in_float]
            if outside:
                for name in set(present) - set(outside):
                    del ranges[name]
                    in_float[name] = f"consumers multiply it together with {outside[0]}, which stays in float"
                continue
            low = min(ranges[name].low for name in present)
            high = max(ranges[name].high for name in present)
            symmetric = all(ranges[name].symmetric for name in present)
            unified = {name: replace(ranges[name], low=low, high=high, symmetric=symmetric) for name in present}
            changed = [name for name in present if unified[name] != ranges[name]]
            if changed:
                notes.append(
                    f"{', '.join(changed)}: range widened to that of its fused siblings, {low:.6g}..{high:.6g}"
                )
            ranges.update(unified)
    return notes
