# SPDX-License-Identifier: Apache-2.0
"""`Distribution`: what a histogram and a range together say about the values of one tensor.

Of bfloat16 tensors the histogram is exact: every bin is one number. Of float32 and float16 tensors a bin is an interval
of relative width 2^-8 in which values are taken as uniform; the outermost intervals end at the exact extremes, and the
exact largest magnitude is kept as a value of its own, for in a spiked tensor that single value carries the energy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calib.scales.magnitudes import FINITE, Magnitudes
from calib.statistics.histogram import BINS, FloatHistogram
from calib.statistics.range import Range

__all__ = ["BODY", "Distribution"]

BODY = 0.999
"""Body v1: values with abs(x) up to this quantile of the tensor, in bins of its histogram."""
_SIGN = 0x8000


@dataclass(frozen=True, eq=False)
class Distribution:
    """All values of a tensor, or of one of its position groups.

    Attributes:
        minimum: smallest value, exact; 0 if there is none.
        maximum: largest value, exact; 0 if there is none.
        count: how many values there are.
        energy: sum of x^2, exact.
        exact: every value is known, not only its bin.
        dense: int64 ``[65536]``, counts by bfloat16 bit pattern.
        whole: the distribution of which this is a part and whose body decides; None if it is whole itself.
    """

    minimum: float
    maximum: float
    count: int
    energy: float
    exact: bool
    dense: NDArray[np.int64]
    whole: Distribution | None = None

    @classmethod
    def of(
        cls,
        histogram: FloatHistogram,
        extent: Range,
        dtype: str,
        *,
        group: int | None = None,
        whole: Distribution | None = None,
    ) -> Distribution:
        """From the statistics of a site.

        Args:
            histogram: counts by bfloat16 bin.
            extent: exact extremes and energy of the same values.
            dtype: of the tensor, e.g. "bfloat16", in which alone the histogram is exact.
            group: `REST` or `SINK`; both together if absent.
            whole: the distribution of the whole tensor where this is a part of it.
        """
        if group is not None:
            extent = extent.of(group)
        dense = np.zeros(BINS, np.int64)
        for index in range(len(histogram.bins)):
            if group is None or group == index:
                dense[histogram.bins[index]] += histogram.counts[index].astype(np.int64)
        smallest, largest = (extent.min, extent.max) if extent.count_all else (0.0, 0.0)
        exact = dtype == "bfloat16" or smallest == largest
        return cls(smallest, largest, histogram.count(group), extent.sum_of_squares, exact, dense, whole)

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.minimum), abs(self.maximum))

    @property
    def zeros(self) -> int:
        """How many values are zero, or too small for any bfloat16 number."""
        return int(self.dense[0] + self.dense[_SIGN])

    @cached_property
    def positive(self) -> Magnitudes:
        """The values above zero."""
        return self._side(self.dense[:FINITE], max(self.minimum, 0.0), max(self.maximum, 0.0))

    @cached_property
    def negative(self) -> Magnitudes:
        """The values below zero, as magnitudes."""
        return self._side(self.dense[_SIGN : _SIGN + FINITE], max(-self.maximum, 0.0), max(-self.minimum, 0.0))

    @cached_property
    def folded(self) -> Magnitudes:
        """The magnitudes of all values."""
        both = self.dense[:FINITE] + self.dense[_SIGN : _SIGN + FINITE]
        return self._side(both, max(self.minimum, -self.maximum, 0.0), self.amax)

    def _side(self, dense: NDArray[np.int64], floor: float, ceiling: float) -> Magnitudes:
        if self.minimum == self.maximum:  # a constant is known exactly whatever its dtype
            return Magnitudes.point(ceiling, int(dense[1:].sum()))
        return Magnitudes.of(dense, exact=self.exact, floor=floor, ceiling=ceiling)

    @cached_property
    def body_limit(self) -> float:
        """The largest bin of the body, as a bfloat16 number: the 0.999 quantile of |x|."""
        if self.whole is not None:
            return self.whole.body_limit
        rank = max(1, int(np.ceil(BODY * self.count - 1e-9))) - self.zeros
        side = self.folded
        return float(side.value[np.searchsorted(side.counts_below[1:], rank)]) if rank > 0 and side.value.size else 0.0

    def body_size(self, side: Magnitudes) -> int:
        """How many entries of a side, from the smallest up, belong to the body."""
        if self.minimum == self.maximum:
            return int(side.value.size)
        return int(np.searchsorted(side.value, self.body_limit, side="right"))

    def clipped_abs(self, share: float) -> float:
        """The magnitude above which at most that share of all values lies; 0 if that leaves only zeros."""
        rank = self.count - int(share * self.count + 1e-9) - self.zeros
        return self.folded.at_rank(rank) if rank > 0 else 0.0

    def clipped_range(self, share: float) -> tuple[float, float]:
        """The values outside of which at most that share of all values lies, half of it at each end."""
        cut = int(share / 2 * self.count + 1e-9)
        return self._at_rank(cut + 1), self._at_rank(self.count - cut)

    def _at_rank(self, rank: int) -> float:
        below = round(self.negative.total)
        if rank <= below:
            return -self.negative.at_rank(below - rank + 1)
        above = rank - below - self.zeros
        return self.positive.at_rank(above) if above > 0 else 0.0
