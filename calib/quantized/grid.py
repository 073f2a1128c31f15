# SPDX-License-Identifier: Apache-2.0
"""`IntegerGrid`: which codes exist, how a range becomes a scale, and the arithmetic between values and codes.

All arithmetic is float32, on the device of the tensor, without a device synchronisation. A scale is always a tensor on
that device: dividing by a number, or by a tensor on another device, becomes a multiplication by its reciprocal on
CUDA, which rounds differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch

from calib.errors import UsageError
from calib.scales.grid import SMALLEST_SCALE, Grid

__all__ = ["Convention", "IntegerGrid", "dequantize", "quantize"]

Convention = Literal["calib", "compressed-tensors"]
"""Whose formula makes a scale of a range."""

_UNUSABLE = torch.finfo(torch.float32).eps  # what compressed-tensors takes where all values are 0


@dataclass(frozen=True)
class IntegerGrid:
    """Codes ``qmin .. qmax``, and how a range becomes a step.

    Attributes:
        qmin: first code.
        qmax: last code.
        intervals: scale = max(|low|, |high|) / intervals (symmetric), else (high - low) / intervals.
        symmetric: the zero point is 0.
        zero_point_first: ``rint(x / scale + zero_point)``, as compressed-tensors has it, instead of
            ``rint(x / scale) + zero_point``, as ONNX has it. They differ on ties if the zero point is odd.
    """

    qmin: int
    qmax: int
    intervals: float
    symmetric: bool = True
    zero_point_first: bool = False

    @classmethod
    def of(cls, bits: int, *, symmetric: bool = True, convention: Convention = "calib") -> Self:
        """The grid of a convention.

        ``calib``: amax / 127 on -127..127 (8 bits, symmetric). ``compressed-tensors``: amax / 127.5 on -128..127.
        Asymmetric, both: (high - low) / 255 on -128..127.

        Raises:
            UsageError: bits outside 2..16, or an unknown convention.
        """
        grid = Grid(bits, symmetric)
        if convention == "calib":
            return cls(grid.qmin, grid.qmax, grid.intervals, symmetric)
        if convention != "compressed-tensors":
            raise UsageError(f"convention {convention!r}: unknown; choose calib or compressed-tensors")
        intervals = grid.qmax + 0.5 if symmetric else 2 * grid.qmax + 1
        return cls(-grid.qmax - 1, grid.qmax, intervals, symmetric, zero_point_first=True)

    def step(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point of ranges, float32, the shape of ``low`` and ``high``; no zero point if symmetric.

        A range without a usable scale (all values 0, or below 2^-126 steps) takes 2^-23, on which 0 stays 0.
        """
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        width = torch.maximum(-low, high) if self.symmetric else high - low
        scale = width / torch.full_like(width, self.intervals)
        scale = torch.where(scale < SMALLEST_SCALE, _UNUSABLE, scale)
        if self.symmetric:
            return scale, None
        return scale, torch.clamp(self.qmin - low / scale, self.qmin, self.qmax).round_()


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    *,
    zero_point_first: bool = False,
) -> torch.Tensor:
    """Codes of values, ties to even, saturating.

    Args:
        x: floating point, any shape.
        scale: float32, broadcast against ``x``.
        zero_point: whole numbers in float32, broadcast against ``x``; None for 0.
        qmin: first code.
        qmax: last code.
        zero_point_first: see `IntegerGrid`.

    Returns:
        Whole numbers in float32, the shape of ``x``. NaN stays NaN.
    """
    codes = x.float() / scale
    if zero_point is None:
        return codes.round_().clamp_(qmin, qmax)
    codes = codes.add_(zero_point).round_() if zero_point_first else codes.round_().add_(zero_point)
    return codes.clamp_(qmin, qmax)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """Values of codes, float32: ``(codes - zero_point) * scale``."""
    values = codes.float()
    return (values if zero_point is None else values - zero_point) * scale
