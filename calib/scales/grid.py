# SPDX-License-Identifier: Apache-2.0
"""`Grid`: the levels of an integer scheme, and how a range becomes a scale and a zero point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import UsageError

__all__ = ["SMALLEST_SCALE", "Grid", "Step"]

SMALLEST_SCALE = 2.0**-126
"""Smallest normal float32. Below it hardware may flush a scale to 0 and divide by it, so no such scale is given."""


@dataclass(frozen=True)
class Step:
    """A chosen grid.

    Attributes:
        low: lower end of the range it was made for, a float32 number.
        high: upper end, a float32 number.
        scale: distance of neighbouring levels, a float32 number.
        zero_point: level that stands for 0.
    """

    low: float
    high: float
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Grid:
    """An integer grid of 2 to 16 bits.

    Symmetric: levels -(2^(bits-1) - 1) .. 2^(bits-1) - 1, scale = max(|low|, |high|) / qmax. Asymmetric: levels
    -2^(bits-1) .. 2^(bits-1) - 1, the range extended to hold 0, scale = (high - low) / (2^bits - 1) and
    zero_point = rint(qmin - low / scale). Scales are rounded to float32.

    Raises:
        UsageError: bits outside 2..16.
    """

    bits: int = 8
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise UsageError(f"bits {self.bits}: outside of what an integer grid offers; choose 2 to 16")

    @property
    def qmax(self) -> int:
        """Last level."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def qmin(self) -> int:
        """First level."""
        return -self.qmax if self.symmetric else -self.qmax - 1

    @property
    def intervals(self) -> int:
        """Steps that the range is divided into."""
        return self.qmax if self.symmetric else self.qmax - self.qmin

    @property
    def formula(self) -> str:
        """How a scale follows from the ends of a range."""
        if self.symmetric:
            return f"max(|range|)/{self.intervals}"
        return f"(range_max - range_min)/{self.intervals}"

    def step(self, low: float, high: float) -> Step | None:
        """The grid for a range; None if no usable scale exists: all values are 0, or below `SMALLEST_SCALE` steps."""
        # ends are rounded first, so that whoever derives the scale from the recorded range finds the same number
        low, high = float(np.float32(low)), float(np.float32(high))
        if self.symmetric:
            high = max(abs(low), abs(high))
            low = -high
            width = high
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            width = high - low
        scale = float(np.float32(width / self.intervals))
        if not SMALLEST_SCALE <= scale < math.inf:
            return None
        point = 0 if self.symmetric else min(max(round(self.qmin - low / scale), self.qmin), self.qmax)
        return Step(low + 0.0, high + 0.0, scale, point)  # -0 becomes 0

    def steps(
        self, low: NDArray[np.float32], high: NDArray[np.float32], fallback: Step
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scales and zero points of many rows or channels, ``[n]`` each.

        Rows without a usable scale of their own (all 0, or nothing seen) take that of the whole tensor: it is real,
        it represents 0 exactly, and it does not vanish in half precision.
        """
        # unseen rows hold (+inf, -inf)
        lows = np.where(np.isfinite(low), low, 0).astype(np.float64)
        highs = np.where(np.isfinite(high), high, 0).astype(np.float64)
        if self.symmetric:
            width = np.maximum(np.abs(lows), np.abs(highs))
        else:
            lows, highs = np.minimum(lows, 0), np.maximum(highs, 0)
            width = highs - lows
        scales = (width / self.intervals).astype(np.float32)
        usable = scales >= np.float32(SMALLEST_SCALE)
        scales = np.where(usable, scales, np.float32(fallback.scale))
        if self.symmetric:
            return scales, np.zeros(scales.shape, np.int64)
        points = np.clip(np.rint(self.qmin - lows / scales.astype(np.float64)), self.qmin, self.qmax)
        return scales, np.where(usable, points, fallback.zero_point).astype(np.int64)
