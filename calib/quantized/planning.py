# SPDX-License-Identifier: Apache-2.0
"""`plan_from_scales`: a quantization plan from a scale file, or without one where nothing static is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from calib.errors import ModelError, UsageError
from calib.quantized.grid import Convention, IntegerGrid
from calib.quantized.plan import QuantizationPlan
from calib.quantized.quantizers import DynamicQuantizer, Float8Quantizer, StaticQuantizer, TensorQuantizer
from calib.quantized.weights import QuantizedWeight, WeightScheme
from calib.scales.float8 import FLOAT8_MAX
from calib.scales.routers import IN_FLOAT, router_layers
from calib.schema.scales import ScaleFile, TensorScale
from calib.sites import Selection, find_ports
from calib.sites.port import Axes
from calib.sites.structure import Structure, is_norm, is_projection

__all__ = ["plan_from_scales"]

Activations = Literal["static", "dynamic-per-token", "none"]

_HEAD = "the output head stays in floating point"


def plan_from_scales(
    model: nn.Module,
    scales: ScaleFile | None = None,
    *,
    inputs: Activations = "static",
    weights: WeightScheme | Literal["scales"] | None = "scales",
    kv_cache: Activations = "none",
    kv_bits: int | None = None,
    bits: int | None = None,
    dtype: Literal["int", "float8"] = "int",
    convention: Convention = "calib",
    ignore: Sequence[str] = (),
    include_head: bool = False,
    skip_positions: int = 0,
) -> QuantizationPlan:
    """Plans every linear layer, transformers `Conv1D` and convolution of a model; what is left out has its reason.

    Args:
        model: the one that was measured.
        scales: its scale file; needed for anything static. Modules that it ignores stay in float.
        inputs: of linear layers and convolutions. A convolution has no tokens: its dynamic scale is per tensor.
        weights: ``scales``: those of the file, or where there is none one scale per output row by absmax.
        kv_cache: keys and values as attention gets them, per tensor (static) or per token and head.
        kv_bits: of keys and values; those of the file by default. Another number takes the file's range.
        bits: of dynamic and absmax grids; those of the file by default, or 8.
        dtype: integers, or FP8 E4M3 for inputs, keys, values and weights.
        convention: whose formula makes a scale of a range. With ``compressed-tensors`` scales are derived again, as
            an exported checkpoint has them.
        ignore: patterns of modules left in float, weight and input, as `calib.sites.Selection` reads them.
        include_head: quantize the output head too; its embedding, if tied, stays as it is.
        skip_positions: see `QuantizationPlan`.

    Raises:
        UsageError: a static scale is asked for without a file, or a pattern matches nothing.
        ModelError: nothing is left to quantize.
    """
    for what, value in (("inputs", inputs), ("kv_cache", kv_cache)):
        if value not in ("static", "dynamic-per-token", "none"):
            raise UsageError(f"{what} {value!r}: unknown; choose static, dynamic-per-token or none")
    if scales is None and "static" in (inputs, kv_cache):
        raise UsageError("plan: static scales need a scale file; choose dynamic-per-token or none without one")
    planner = _Planner(
        model,
        Structure.of(model),
        {} if scales is None else {n: t for name, t in scales.tensors.items() for n in [name, *t.shared_with]},
        bits or (8 if scales is None else scales.bits),
        dtype,
        convention,
        {},
    )
    in_float = planner.left_in_float(scales, ignore, include_head=include_head)
    planned_inputs: dict[str, TensorQuantizer] = {}
    planned_weights: dict[str, WeightScheme | QuantizedWeight] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_projection(module):
            continue
        if name in in_float:
            left_out[name] = in_float[name]
            continue
        found = planner.inputs(name, module, inputs)
        if isinstance(found, str):
            left_out[name] = found
            continue
        planned_inputs |= found
        if weights is not None:
            planned_weights[name] = planner.weight(name) if weights == "scales" else weights
    attention, unseen = planner.attention(kv_cache, kv_bits)
    plan = QuantizationPlan(
        inputs=planned_inputs,
        weights=planned_weights,
        attention=attention,
        skip_positions=skip_positions,
        left_out={**left_out, **unseen, **dict(planner.other_parameters())},
    )
    if not (plan.inputs or plan.weights or plan.attention):
        why = next(iter(left_out.values()), "it has no linear layer")
        raise ModelError(f"{type(model).__name__}: nothing to quantize, {why}; measure this model, or ask for more")
    return plan


@dataclass
class _Planner:
    model: nn.Module
    structure: Structure
    readers: dict[str, TensorScale]
    bits: int
    dtype: Literal["int", "float8"]
    convention: Convention
    made: dict[tuple[int, Axes], TensorQuantizer]

    def left_in_float(self, scales: ScaleFile | None, ignore: Sequence[str], *, include_head: bool) -> dict[str, str]:
        """Projections that must not be touched, and why."""
        projections = {name: m for name, m in self.model.named_modules() if is_projection(m)}
        found: dict[str, str] = {}
        for name, module in projections.items():
            parent = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                found[name] = "nn.MultiheadAttention multiplies without calling this module"
            elif module._parameters.get("weight") is None:
                found[name] = "its weight is computed (parametrized), not a parameter"
        found |= {} if scales is None else dict.fromkeys(scales.ignore, "the scale file leaves it in float")
        found |= dict.fromkeys(router_layers(self.structure.routers, projections), IN_FLOAT)
        if self.structure.head is not None and not include_head:
            found[self.structure.head] = _HEAD
        for pattern in ignore:
            selection = Selection(ignored=[pattern])
            names = [n for n in projections if not selection.keeps([n, f"{n}:input", f"{n}:weight"], "linear_input")]
            if not names:
                raise UsageError(f"ignore {pattern}: matches no linear layer or convolution of this model")
            found |= dict.fromkeys(names, "ignored on request")
        return found

    def inputs(self, name: str, module: nn.Module, mode: Activations) -> dict[str, TensorQuantizer] | str:
        """Quantizers of the input of a module, by call if it has several scales; or why there is none."""
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if mode == "none":
            return {}
        if mode == "dynamic-per-token":
            return {name: self.dynamic(self.bits, per_token=not convolution)}
        axes: Axes = "channels_first" if convolution else "tokens"
        port = f"{name}:input"
        if port in self.readers:
            return {name: self.static(self.readers[port], axes)}
        calls = sorted(n for n in self.readers if n.startswith(port + "#"))
        if not calls:
            return "its input was not measured, or was zero"
        return {f"{name}#{n.partition('#')[2]}": self.static(self.readers[n], axes) for n in calls}

    def weight(self, name: str) -> WeightScheme:
        """The scheme of a weight: the file's scale, or per row by absmax."""
        if self.dtype == "float8":
            return WeightScheme(None)
        tensor = self.readers.get(f"{name}:weight")
        if tensor is None or self.convention != "calib" or tensor.scheme.bits != self.bits:
            symmetric = tensor is None or tensor.scheme.symmetric
            grid = IntegerGrid.of(self.bits, symmetric=symmetric, convention=self.convention)
            per_tensor = tensor is not None and tensor.scheme.granularity == "per-tensor"
            return WeightScheme(grid, "per-tensor" if per_tensor else "per-row")
        grid, scale, point = _recorded(tensor)
        return WeightScheme(grid, "per-row" if scale.ndim else "per-tensor", scale=scale, zero_point=point)

    def attention(
        self, mode: Activations, bits: int | None
    ) -> tuple[dict[str, dict[str, TensorQuantizer]], dict[str, str]]:
        """Quantizers of keys and values, and where they cannot be had."""
        if mode == "none":
            return {}, {}
        ports = [p for p in find_ports(self.model) if p.kind in ("key", "value") and not p.cached]
        found: dict[str, dict[str, TensorQuantizer]] = {}
        # a block without a declared attention is named itself: it may hold an undeclared one, or none
        holders = [*self.structure.attentions]
        holders += [b.name for b in self.structure.blocks if not any(n.startswith(b.name + ".") for n in holders)]
        unseen = {
            f"{name}:{part}": "no attention through transformers' interface: keys and values cannot be reached"
            for name in holders
            for part in ("key", "value")
        }
        for port in ports:
            unseen.pop(port.name, None)
            if mode == "dynamic-per-token":
                quantizer: TensorQuantizer | None = self.dynamic(bits or self.bits, per_token=True)
            else:
                tensor = self.readers.get(port.name)
                quantizer = None if tensor is None else self.static(tensor, "heads", bits)
            if quantizer is None:
                unseen[port.name] = "it was not measured, or was zero"
            else:
                found.setdefault(port.module, {})[port.port] = quantizer
        if not found and not unseen:
            unseen["kv_cache"] = "no attention was found in this model"
        return found, unseen

    def dynamic(self, bits: int, *, per_token: bool) -> TensorQuantizer:
        """A dynamic quantizer."""
        granularity: Literal["per-token", "per-tensor"] = "per-token" if per_token else "per-tensor"
        if self.dtype == "float8":
            return Float8Quantizer(None, granularity)
        return DynamicQuantizer(IntegerGrid.of(bits, convention=self.convention), granularity)

    def static(self, tensor: TensorScale, axes: Axes, bits: int | None = None) -> TensorQuantizer:
        """The quantizer of one entry: one object for all of its readers, so that its tensor is rounded once."""
        key = (id(tensor), axes)
        if key not in self.made:
            self.made[key] = self._static(tensor, axes, bits)
        return self.made[key]

    def _static(self, tensor: TensorScale, axes: Axes, bits: int | None) -> TensorQuantizer:
        if self.dtype == "float8":
            amax = torch.tensor(max(abs(tensor.range_min), abs(tensor.range_max)), dtype=torch.float32)
            return Float8Quantizer(amax / torch.tensor(FLOAT8_MAX), axes=axes)
        bits = bits or tensor.scheme.bits
        if tensor.scheme.dynamic:
            return self.dynamic(bits, per_token=tensor.scheme.granularity == "per-token")
        if self.convention == "calib" and bits == tensor.scheme.bits:
            grid, scale, point = _recorded(tensor)
        else:
            low, high = torch.tensor([tensor.range_min, tensor.range_max], dtype=torch.float32)
            grid = IntegerGrid.of(bits, symmetric=tensor.scheme.symmetric, convention=self.convention)
            scale, point = grid.step(low, high)
        return StaticQuantizer(grid, scale, point, axes)

    def other_parameters(self) -> Iterator[tuple[str, str]]:
        """Matrices that no projection holds."""
        for name, module in self.model.named_modules():
            if is_projection(module) or is_norm(module):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    reason = f"a parameter of {type(module).__name__}, which multiplies by it without a linear layer"
                    if isinstance(module, nn.Embedding):
                        reason = "an embedding is looked up, not multiplied"
                    elif parameter.ndim == 3:
                        reason = f"a fused parameter of {type(module).__name__} (experts); only modules are quantized"
                    yield f"{name}.{key}" if name else key, reason


def _recorded(tensor: TensorScale) -> tuple[IntegerGrid, torch.Tensor, torch.Tensor | None]:
    """The grid, scale and zero point that a file holds."""
    symmetric = tensor.scheme.symmetric
    intervals = float(tensor.qmax) if symmetric else float(tensor.qmax - tensor.qmin)
    scale = torch.tensor(math.nan if tensor.scale is None else tensor.scale, dtype=torch.float32)
    point = None if symmetric else torch.tensor(tensor.zero_point, dtype=torch.float32)
    return IntegerGrid(tensor.qmin, tensor.qmax, intervals, symmetric), scale, point
