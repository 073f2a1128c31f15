# SPDX-License-Identifier: Apache-2.0
"""`FloatHistogram`: how often each bfloat16 number occurs, the statistic that answers later questions offline.

A bin is the bit pattern of a value rounded to bfloat16 (nearest, ties to even): 1 sign bit, 8 exponent bits, 7 mantissa
bits, so 65,536 bins whose edges are known before any data is seen. Hence no range pass, no growing, no re-binning,
and merging is addition. Of bfloat16 data it is the exact distribution; of float32 and float16 data each value is
known within a relative error of 2^-8. Percentiles, clipping and rounding errors of any grid follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import GROUPS, Observation

__all__ = ["BINS", "FloatHistogram", "bfloat16_bins", "bin_edges", "bin_values"]

BINS = 1 << 16
_LARGEST_FINITE = 0x7F7F
_SIGN = 0x8000

Pair = tuple[NDArray[np.generic], NDArray[np.generic]]


def bfloat16_bins(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bin of each finite float32 value: its bfloat16 bit pattern.

    Finite values that bfloat16 would round to infinity go to the largest finite bin, and -0 to +0.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    magnitude = np.minimum(rounded & np.uint16(_SIGN - 1), np.uint16(_LARGEST_FINITE))
    return np.where(magnitude == 0, np.uint16(0), magnitude | (rounded & np.uint16(_SIGN))).astype(np.uint16)


def bin_values(bins: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The bfloat16 number of each bin, as float64."""
    return (bins.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bin_edges(bins: NDArray[np.uint16]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper end of the reals that round to each bin, as float64.

    Bin 0 reaches from -2^-134 to 2^-134, half of the smallest bfloat16 number.
    """
    magnitude = (bins & np.uint16(_SIGN - 1)).astype(np.int64)
    centre = bin_values(magnitude.astype(np.uint16))
    above = np.where(magnitude == _LARGEST_FINITE, 2.0**128, bin_values((magnitude + 1).astype(np.uint16)))
    below = np.where(magnitude == 0, -above, bin_values(np.maximum(magnitude - 1, 0).astype(np.uint16)))
    inner = (centre + below) / 2
    # the largest bin also takes the finite values that bfloat16 would round to infinity
    outer = np.where(magnitude == _LARGEST_FINITE, above, (centre + above) / 2)
    negative = bins >= _SIGN
    return np.where(negative, -outer, inner), np.where(negative, -inner, outer)


@dataclass(frozen=True, eq=False)
class FloatHistogram:
    """Counts of the non-empty bins per position group; index 0 is the body of a block, 1 its sink positions.

    Law: counts of equal bins add; exact, commutative, associative. Non-finite values are not counted.

    Attributes:
        bins: per group, uint16 ``[n]``, ascending bit patterns of the non-empty bins.
        counts: per group, int64 ``[n]``, how many values fell in each.
    """

    bins: Pair
    counts: Pair

    @classmethod
    def empty(cls) -> FloatHistogram:
        """The neutral element."""
        none = np.zeros(0, np.uint16), np.zeros(0, np.int64)
        return cls((none[0], none[0]), (none[1], none[1]))

    @classmethod
    def from_dense(cls, dense: NDArray[np.integer]) -> FloatHistogram:
        """From counts of all bins, any integer dtype ``[2, 65536]``."""
        bins = [np.flatnonzero(row).astype(np.uint16) for row in dense]
        counts = [row[b].astype(np.int64) for row, b in zip(dense, bins, strict=True)]
        return cls((bins[0], bins[1]), (counts[0], counts[1]))

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> FloatHistogram:
        """The histogram of one batch ``[blocks, tokens, channels]``: the definition kernels are tested against."""
        dense = np.zeros((GROUPS, BINS), np.int64)
        for group in range(GROUPS):
            rows = values[context.group == group]
            dense[group] = np.bincount(bfloat16_bins(rows[np.isfinite(rows)]), minlength=BINS)
        return cls.from_dense(dense)

    def merge(self, other: FloatHistogram) -> FloatHistogram:
        """The histogram of both sets of values."""
        merged = []
        for group in range(GROUPS):
            bins = np.concatenate([self.bins[group], other.bins[group]])
            unique, inverse = np.unique(bins, return_inverse=True)
            counts = np.zeros(unique.size, np.int64)
            np.add.at(counts, inverse, np.concatenate([self.counts[group], other.counts[group]]))
            merged.append((unique, counts))
        return FloatHistogram((merged[0][0], merged[1][0]), (merged[0][1], merged[1][1]))

    def of(self, group: int) -> FloatHistogram:
        """The same histogram with the other group emptied."""
        none = FloatHistogram.empty()
        kept = [self if g == group else none for g in range(GROUPS)]
        return FloatHistogram((kept[0].bins[0], kept[1].bins[1]), (kept[0].counts[0], kept[1].counts[1]))

    def count(self, group: int | None = None) -> int:
        """Values counted in one group, or in both."""
        return sum(int(c.sum()) for g, c in enumerate(self.counts) if group is None or g == group)

    def combined(
        self, group: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """The distribution of one group, or of both together.

        Returns:
            Four arrays ``[n]`` ascending by value: the bfloat16 numbers, their counts, and the lower and upper end
            of the reals that round to them.
        """
        if group is None:
            both = self._sum_of_groups()
            bins, counts = both
        else:
            bins, counts = self.bins[group].astype(np.uint16), self.counts[group].astype(np.int64)
        # bit patterns of negative numbers grow with magnitude: reverse them to ascend by value
        negative = bins >= _SIGN
        order = np.concatenate([np.flatnonzero(negative)[::-1], np.flatnonzero(~negative)])
        bins, counts = bins[order], counts[order]
        low, high = bin_edges(bins)
        return bin_values(bins), counts, low, high

    def _sum_of_groups(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        dense = np.zeros(BINS, np.int64)
        for bins, counts in zip(self.bins, self.counts, strict=True):
            dense[bins] += counts
        bins = np.flatnonzero(dense)
        return bins.astype(np.uint16), dense[bins]

    def quantile_abs(self, q: float, group: int | None = None) -> float:
        """The smallest bfloat16 magnitude m with at least a share q of all values having abs(x) <= m."""
        return self.quantiles_abs((q,), group)[0]

    def quantiles_abs(self, shares: Sequence[float], group: int | None = None) -> list[float]:
        """Several quantiles at once.

        Raises:
            ValueError: a share is outside 0..1, or nothing was counted.
        """
        values, counts, _, _ = self.combined(group)
        if not counts.size:
            raise ValueError("an empty histogram has no quantiles")
        order = np.argsort(np.abs(values), kind="stable")
        magnitudes, reached = np.abs(values[order]), np.cumsum(counts[order])
        found = []
        for share in shares:
            if not 0 <= share <= 1:
                raise ValueError(f"quantile {share} is outside 0..1")
            # smallest rank r with r / n >= share; subtracting keeps an exact share from rounding up to the next rank
            rank = max(1, int(np.ceil(share * float(reached[-1]) - 1e-9)))
            found.append(float(magnitudes[np.searchsorted(reached, rank)]))
        return found

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file."""
        return {
            "rest_bins": self.bins[0],
            "rest_counts": self.counts[0],
            "sink_bins": self.bins[1],
            "sink_counts": self.counts[1],
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> FloatHistogram:
        """The inverse of `to_tensors`."""
        return cls(
            (tensors["rest_bins"].astype(np.uint16), tensors["sink_bins"].astype(np.uint16)),
            (tensors["rest_counts"].astype(np.int64), tensors["sink_counts"].astype(np.int64)),
        )
