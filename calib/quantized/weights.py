# SPDX-License-Identifier: Apache-2.0
"""How a weight is put on a grid (`WeightScheme`), and a weight that is (`QuantizedWeight`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from calib.errors import UsageError
from calib.quantized.fake_quantize import fake_quantize, fake_quantize_float8
from calib.quantized.grid import IntegerGrid, dequantize
from calib.scales.float8 import FLOAT8_MAX
from calib.scales.grid import SMALLEST_SCALE

__all__ = ["QuantizedWeight", "WeightGranularity", "WeightScheme", "as_matrix", "from_matrix", "is_linear"]

WeightGranularity = Literal["per-row", "per-tensor", "per-group"]


@dataclass(frozen=True, eq=False)
class WeightScheme:
    """Grid and granularity of a weight, seen as a matrix ``[outputs, inputs]``.

    Attributes:
        grid: the codes; None for FP8 E4M3 with scale = amax / 448.
        granularity: one scale per output row, per tensor, or per group of inputs in a row.
        group_size: inputs per group; only for per-group.
        scale: float32 ``[outputs]`` or ``[]``; from the extremes of the weight if absent.
        zero_point: whole numbers in float32, the shape of ``scale``.
        scale_gradient: see `fake_quantize`.

    Raises:
        UsageError: a group size without groups, or groups without a size.
    """

    grid: IntegerGrid | None
    granularity: WeightGranularity = "per-row"
    group_size: int = 0
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    scale_gradient: float = 1.0

    def __post_init__(self) -> None:
        if (self.granularity == "per-group") != (self.group_size > 0):
            raise UsageError(
                f"weight scheme: {self.granularity} with group size {self.group_size}; "
                "a group size goes with per-group, and only with it"
            )

    def grouped(self, matrix: torch.Tensor, name: str = "weight") -> torch.Tensor:
        """A matrix ``[outputs, inputs]`` as ``[outputs, groups, inputs per group]``, a view.

        Raises:
            UsageError: the group size does not divide the inputs.
        """
        size = self.group_size or matrix.shape[1]
        if matrix.shape[1] % size:
            raise UsageError(f"{name}: {matrix.shape[1]} inputs in groups of {size}; choose a divisor, or leave it out")
        grouped: torch.Tensor = matrix.unflatten(1, (-1, size))
        return grouped

    def step(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point for the result of `grouped`, float32 ``[outputs or 1, groups or 1, 1]``."""
        if self.scale is not None:
            device = grouped.device
            point = None if self.zero_point is None else self.zero_point.to(device).reshape(-1, 1, 1)
            return self.scale.to(device).reshape(-1, 1, 1), point
        low, high = torch.aminmax(grouped.detach().float(), dim=-1, keepdim=True)
        if self.granularity == "per-tensor":
            low, high = low.amin().reshape(1, 1, 1), high.amax().reshape(1, 1, 1)
        if self.grid is not None:
            return self.grid.step(low, high)
        amax = torch.maximum(-low, high)
        scale = amax / torch.full_like(amax, FLOAT8_MAX)
        return torch.where(scale < SMALLEST_SCALE, 1.0, scale), None

    def fake(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix with every value on its grid; gradients pass straight through, for training."""
        grouped = self.grouped(matrix)
        scale, point = self.step(grouped)
        if self.grid is None:
            return fake_quantize_float8(grouped, scale).flatten(1)
        grid = self.grid
        first = grid.zero_point_first
        return fake_quantize(
            grouped,
            scale,
            point,
            grid.qmin,
            grid.qmax,
            zero_point_first=first,
            scale_gradient=self.scale_gradient,
        ).flatten(1)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight on its grid.

    Attributes:
        codes: int8 (int16 above 8 bits) or float8_e4m3fn, ``[outputs, inputs]``.
        scale: float32 ``[outputs or 1, groups or 1]``.
        zero_point: whole numbers in float32, the shape of ``scale``; None for 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The values that the codes stand for, float32 ``[outputs, inputs]``."""
        grouped = self.codes.unflatten(1, (self.scale.shape[1], -1))
        point = None if self.zero_point is None else self.zero_point.unsqueeze(-1)
        return dequantize(grouped, self.scale.unsqueeze(-1), point).flatten(1)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies tokens by a matrix: `nn.Linear` or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def as_matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight of a projection as ``[outputs, inputs]``, a view. transformers' `Conv1D` holds it transposed."""
    return weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)


def from_matrix(module: nn.Module, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrix`, contiguous, in the shape and dtype of ``like``."""
    weight = matrix.T if type(module).__name__ == "Conv1D" else matrix
    return weight.reshape(like.shape).to(like.dtype).contiguous()
