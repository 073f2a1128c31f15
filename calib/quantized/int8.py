# SPDX-License-Identifier: Apache-2.0
"""`Int8Linear`: a linear layer computed in INT8, with the very codes that fake quantization stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calib.quantized.grid import IntegerGrid, quantize
from calib.quantized.quantizers import IntegerQuantizer, StaticQuantizer
from calib.quantized.weights import QuantizedWeight, WeightScheme, as_matrix, is_linear

__all__ = ["Int8Input", "Int8Linear", "has_fast_int8", "int8_matmul", "why_not_int8"]

_WIDEST = 2**31 // (2 * 128 * 128) - 1
"""Inputs that an int32 sum holds: each adds at most 128 * 128, and as much again for the zero point."""

_CUDA_ROWS, _CUDA_MULTIPLE = 17, 8  # what torch._int_mm asks for on CUDA


@dataclass(frozen=True, eq=False)
class Int8Input:
    """An input on its grid.

    Attributes:
        codes: int8, the shape of the input.
        scale: float32, ``[]`` or ``[..., 1]``.
        zero_point: int32, the shape of ``scale``; None for 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, quantizer: IntegerQuantizer) -> Int8Input:
        """Rounds a tensor. NaN has no code: it must not be in it."""
        scale, point = quantizer.step(x)
        grid = quantizer.grid
        codes = quantize(x, scale, point, grid.qmin, grid.qmax, zero_point_first=grid.zero_point_first)
        return cls(codes.to(torch.int8), scale, None if point is None else point.to(torch.int32))


class Int8Linear:
    """``y = ((codes - zero_point) @ weight_codes.T) * scale * weight_scales + bias``, the product in int32, exactly.

    Against fake quantization, which multiplies the same values in float32, each output differs by at most
    ``(inputs + 8) * 2^-24 * (sum_k |x_k| |w_k| + |bias|)``: the rounding of a float32 sum of products.

    Args:
        module: a linear layer or transformers' `Conv1D`; only its bias is used.
        weight: int8 codes ``[outputs, inputs]`` with one symmetric scale, or one per output.
    """

    def __init__(self, module: nn.Module, weight: QuantizedWeight) -> None:
        self.codes = weight.codes
        self.scale = weight.scale.reshape(-1)
        self.row_sums = weight.codes.sum(1, dtype=torch.int32)
        bias: Any = module._parameters.get("bias")
        self.bias: torch.Tensor | None = None if bias is None else bias.detach().float()

    def __call__(self, x: Int8Input, dtype: torch.dtype) -> torch.Tensor:
        """Output ``[..., outputs]`` in a dtype, for an input ``[..., inputs]``."""
        shape = x.codes.shape[:-1]
        total = int8_matmul(x.codes.reshape(-1, x.codes.shape[-1]), self.codes).reshape(*shape, -1)
        if x.zero_point is not None:
            total = total - x.zero_point * self.row_sums
        y = total.float().mul_(x.scale * self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(dtype)


def int8_matmul(a: torch.Tensor, b: torch.Tensor, *, pad: bool | None = None) -> torch.Tensor:
    """``a @ b.T`` of int8 matrices in int32, exactly, by `torch._int_mm`.

    Args:
        a: int8 ``[rows, inputs]``.
        b: int8 ``[outputs, inputs]``.
        pad: fill up with zeros to the shapes that CUDA asks for (more than 16 rows, the rest multiples of 8); by
            default on CUDA.

    Returns:
        int32 ``[rows, outputs]``.
    """
    rows, outputs = a.shape[0], b.shape[0]
    if not rows:
        return a.new_zeros((0, outputs), dtype=torch.int32)
    if a.is_cuda if pad is None else pad:
        width = -a.shape[1] % _CUDA_MULTIPLE
        a = nn.functional.pad(a, (0, width, 0, max(_CUDA_ROWS - rows, 0)))
        b = nn.functional.pad(b, (0, width, 0, -outputs % _CUDA_MULTIPLE))
    return torch._int_mm(a.contiguous(), b.t())[:rows, :outputs]


def has_fast_int8(device: torch.device) -> bool:
    """Whether a product of int8 takes less time there than one of float32: x86 that adds four products at once."""
    if device.type != "cpu":
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def why_not_int8(module: nn.Module, weight: WeightScheme | QuantizedWeight | None, inputs: list[Any]) -> str | None:
    """Why a module cannot be computed in INT8, or None if it can."""
    if not is_linear(module) or module._parameters.get("weight") is None:
        return f"a {type(module).__name__} has no INT8 product here"
    if weight is None or not inputs:
        return "only its weight or only its input is quantized"
    return _why_not_weight(module, weight) or next(filter(None, map(_why_not_input, inputs)), None)


def _why_not_weight(module: nn.Module, weight: WeightScheme | QuantizedWeight) -> str | None:
    if isinstance(weight, WeightScheme):
        integers = weight.grid is not None and _fits(weight.grid)
        plain = not weight.group_size and weight.grid is not None and weight.grid.symmetric
    else:
        integers = weight.codes.dtype == torch.int8
        plain = weight.scale.shape[1] == 1 and weight.zero_point is None
    if not integers:
        return "its weight is not on an 8-bit integer grid"
    if not plain:
        return "its weight has scales per group, or a zero point"
    width = as_matrix(module, module.get_parameter("weight")).shape[1]
    return None if width <= _WIDEST else f"{width} inputs overflow a 32-bit sum"


def _why_not_input(quantizer: Any) -> str | None:
    if not isinstance(quantizer, IntegerQuantizer) or not _fits(quantizer.grid):
        return "its input is not on an 8-bit integer grid"
    if isinstance(quantizer, StaticQuantizer) and quantizer.scale.ndim:
        return "its input has a scale per channel, which cannot be taken out of the sum"
    return None


_INT8 = IntegerGrid(-128, 127, 127.5)


def _fits(grid: IntegerGrid) -> bool:
    return grid.qmin >= _INT8.qmin and grid.qmax <= _INT8.qmax
