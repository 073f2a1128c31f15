# SPDX-License-Identifier: Apache-2.0
"""`Magnitudes`: one side of a distribution, sorted by size, with the running sums that every error formula needs.

A grid treats the two sides of zero alike, up to where each side saturates. So an error is a sum over two sides, or
over one when both saturate at the same size and the sides can be folded. On a side everything below half a step is lost
whole, and what is lost is a running sum; only values between half a step and the end of the grid need work: about as
many octaves of 128 bins as the grid has bits, however wide the tensor's range is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from calib.statistics.histogram import bin_edges, bin_values

__all__ = ["FINITE", "Floats", "Magnitudes"]

Floats = NDArray[np.float64]

FINITE = 0x7F80
"""Number of finite bfloat16 magnitudes, zero among them."""
_NARROW = 2.0**-20  # relative width that stands for "this very value" among intervals; below it, differences cancel


@lru_cache(maxsize=1)
def _tables() -> tuple[Floats, Floats, Floats]:
    bins = np.arange(FINITE, dtype=np.uint16)
    return (bin_values(bins), *bin_edges(bins))


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Magnitudes of the values on one side of zero, ascending; zero itself is on no side.

    Attributes:
        value: float64 ``[n]``, the bfloat16 number of each bin.
        low: float64 ``[n]``, lower end of the interval in which the values lie, uniformly.
        high: float64 ``[n]``, its upper end; equal to `low` where `exact`.
        count: float64 ``[n]``, how many values there are; weights need not be whole numbers.
        exact: the values are points, not intervals.
    """

    value: Floats
    low: Floats
    high: Floats
    count: Floats
    exact: bool

    @classmethod
    def of(cls, dense: NDArray[np.int64], *, exact: bool, floor: float, ceiling: float) -> Magnitudes:
        """From the counts of all magnitudes.

        Args:
            dense: int64 ``[FINITE]``, counts by bfloat16 magnitude; entry 0 (zero) is ignored.
            exact: the values are bfloat16 numbers.
            floor: smallest magnitude that occurs, or 0 where that is not known.
            ceiling: largest magnitude that occurs. It is taken out of its bin: one value is exactly there.
        """
        bins = np.flatnonzero(dense[1:]) + 1
        values, lows, highs = _tables()
        value, count = values[bins], dense[bins].astype(np.float64)
        if exact or not bins.size:
            return cls(value, value, value, count, exact)
        low = np.maximum(lows[bins], floor)
        high = np.minimum(highs[bins], ceiling)
        peak = ceiling * (1 - _NARROW)
        low[-1] = min(low[-1], peak)
        count[-1] -= 1
        keep = slice(None) if count[-1] > 0 else slice(-1)
        return cls(
            np.append(value[keep], value[-1]),
            np.append(low[keep], peak),
            np.append(high[keep], ceiling),
            np.append(count[keep], 1.0),
            exact,
        )

    @classmethod
    def point(cls, magnitude: float, count: int) -> Magnitudes:
        """Of `count` values that are all the same; none if the magnitude is 0."""
        where = np.full(int(magnitude > 0 and count > 0), magnitude)
        return cls(where, where, where, np.full(where.shape, float(count)), True)

    def weighted(self, count: Floats) -> Magnitudes:
        """The same magnitudes with other counts, float64 ``[n]``."""
        return Magnitudes(self.value, self.low, self.high, count, self.exact)

    @cached_property
    def centre(self) -> Floats:
        """Mean of each bin."""
        return self.low if self.exact else (self.low + self.high) / 2

    @cached_property
    def square(self) -> Floats:
        """Mean square of each bin."""
        if self.exact:
            return self.low * self.low
        mean: Floats = (self.low * self.low + self.low * self.high + self.high * self.high) / 3
        return mean

    @cached_property
    def counts_below(self) -> Floats:
        """Running sum of counts, ``[n + 1]``, from 0."""
        return _running(self.count)

    @cached_property
    def sums_below(self) -> Floats:
        """Running sum of magnitudes, ``[n + 1]``, from 0."""
        return _running(self.count * self.centre)

    @cached_property
    def squares_below(self) -> Floats:
        """Running sum of squares, ``[n + 1]``, from 0."""
        return _running(self.count * self.square)

    @cached_property
    def moments_above(self) -> tuple[Floats, Floats, Floats]:
        """Sums of 1, x and x^2 from each bin to the top, ``[n + 1]`` each, added from the top."""
        count, centre, square = self.count[::-1], self.centre[::-1], self.square[::-1]
        sums = [_running(v)[::-1] for v in (count, count * centre, count * square)]
        return sums[0], sums[1], sums[2]

    @cached_property
    def width(self) -> Floats:
        """Width of the bfloat16 bin around each magnitude: 8 bits of mantissa, or the subnormal step."""
        _, exponent = np.frexp(self.value)
        return np.asarray(np.ldexp(1.0, np.maximum(exponent - 8, -133)))

    @cached_property
    def widths_below(self) -> Floats:
        """Running sum of the widths of bins that are not empty, ``[n + 1]``, from 0."""
        return _running(self.width)

    @cached_property
    def entropies_below(self) -> Floats:
        """Running sum of c log(c / width), ``[n + 1]``, from 0."""
        return _running(self.count * np.log(self.count / self.width))

    @property
    def total(self) -> float:
        """How many values there are."""
        return float(self.counts_below[-1])

    @property
    def top(self) -> float:
        """The largest magnitude; 0 if there is none."""
        return float(self.high[-1]) if self.high.size else 0.0

    def count_below(self, limit: float) -> float:
        """How many magnitudes are at most `limit`; an interval that contains it counts in proportion."""
        whole = int(np.searchsorted(self.high, limit, side="right"))
        below = float(self.counts_below[whole])
        if not self.exact:
            begun = int(np.searchsorted(self.low, limit, side="left"))
            low, high = self.low[whole:begun], self.high[whole:begun]
            below += float(np.dot(self.count[whole:begun], (limit - low) / (high - low)))
        return below

    def at_rank(self, rank: float) -> float:
        """The magnitude at that rank, 1 = smallest; inside an interval in proportion.

        Raises:
            IndexError: there are fewer magnitudes.
        """
        index = int(np.searchsorted(self.counts_below[1:], rank - 1e-6))
        inside = (rank - self.counts_below[index]) / self.count[index]
        return float(self.low[index] + (self.high[index] - self.low[index]) * min(max(inside, 0.0), 1.0))


def _running(values: Floats) -> Floats:
    sums = np.empty(values.size + 1)
    sums[0] = 0.0
    np.cumsum(values, out=sums[1:])
    return sums
