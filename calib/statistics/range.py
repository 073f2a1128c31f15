# SPDX-License-Identifier: Apache-2.0
"""`Range`: exact extremes, counts and moments of a site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import GROUPS, Observation
from calib.statistics.summation import block_sum, exact_float, exact_integer, pairwise_sum

__all__ = ["Range"]

_BYTES = 80  # of one exact sum: 2^-298 .. 2^340, more than any sum of float32 squares needs


@dataclass(frozen=True, eq=False)
class Range:
    """Extremes, counts and sums per position group; index 0 is the body of a block, 1 its sink positions.

    Law: extremes by min and max, counts and sums by integer addition; exact, commutative, associative.

    Attributes:
        minimum: float32 ``[2]``, smallest finite value; +inf while a group is empty.
        maximum: float32 ``[2]``, largest finite value; -inf while a group is empty.
        count: int64 ``[2]``, finite values seen.
        nonfinite: int64 ``[2]``, NaN and infinities seen; they enter nothing else.
        total: sum of x per group in units of 2^-298.
        energy: sum of x^2 per group in units of 2^-298.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    count: NDArray[np.int64]
    nonfinite: NDArray[np.int64]
    total: tuple[int, int]
    energy: tuple[int, int]

    @classmethod
    def empty(cls) -> Range:
        """The neutral element."""
        return cls(
            np.full(GROUPS, np.inf, np.float32),
            np.full(GROUPS, -np.inf, np.float32),
            np.zeros(GROUPS, np.int64),
            np.zeros(GROUPS, np.int64),
            (0, 0),
            (0, 0),
        )

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> Range:
        """The range of one batch ``[blocks, tokens, channels]``: the definition that kernels are tested against."""
        result = cls.empty()
        for block, groups in zip(values, context.group, strict=True):
            for group in range(GROUPS):
                rows = block[groups == group]
                finite = np.isfinite(rows)
                kept = np.where(finite, rows, np.float32(0)).astype(np.float64)
                one = cls.empty()
                one.nonfinite[group] = np.count_nonzero(~finite)
                one.count[group] = np.count_nonzero(finite)
                one.minimum[group] = rows.min(initial=np.inf, where=finite) + np.float32(0)
                one.maximum[group] = rows.max(initial=-np.inf, where=finite) + np.float32(0)
                sums = [exact_integer(float(pairwise_sum(block_sum(v)))) for v in (kept, kept * kept)]
                total, energy = ([0] * GROUPS for _ in range(2))
                total[group], energy[group] = sums
                result = result.merge(
                    cls(one.minimum, one.maximum, one.count, one.nonfinite, tuple(total), tuple(energy))  # type: ignore[arg-type]
                )
        return result

    def merge(self, other: Range) -> Range:
        """The range of both sets of values."""
        return Range(
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.count + other.count,
            self.nonfinite + other.nonfinite,
            (self.total[0] + other.total[0], self.total[1] + other.total[1]),
            (self.energy[0] + other.energy[0], self.energy[1] + other.energy[1]),
        )

    def of(self, group: int) -> Range:
        """The same range with the other group emptied."""
        keep = np.arange(GROUPS) == group
        return Range(
            np.where(keep, self.minimum, np.float32(np.inf)),
            np.where(keep, self.maximum, np.float32(-np.inf)),
            np.where(keep, self.count, 0),
            np.where(keep, self.nonfinite, 0),
            (self.total[0] * (group == 0), self.total[1] * (group == 1)),
            (self.energy[0] * (group == 0), self.energy[1] * (group == 1)),
        )

    @property
    def count_all(self) -> int:
        """Finite values over both groups."""
        return int(self.count.sum())

    @property
    def nonfinite_all(self) -> int:
        """NaN and infinite values over both groups."""
        return int(self.nonfinite.sum())

    @property
    def min(self) -> float:
        """Smallest value over both groups; +inf if nothing was seen."""
        return float(self.minimum.min())

    @property
    def max(self) -> float:
        """Largest value over both groups; -inf if nothing was seen."""
        return float(self.maximum.max())

    @property
    def amax(self) -> float:
        """Largest magnitude over both groups; 0 if nothing was seen."""
        return max(abs(self.min), abs(self.max)) if self.count_all else 0.0

    @property
    def sum(self) -> float:
        """Sum of all values."""
        return exact_float(sum(self.total))

    @property
    def sum_of_squares(self) -> float:
        """Sum of the squares of all values."""
        return exact_float(sum(self.energy))

    @property
    def mean(self) -> float:
        """Mean of all values; NaN if nothing was seen."""
        return self.sum / self.count_all if self.count_all else math.nan

    @property
    def rms(self) -> float:
        """Root of the mean square; NaN if nothing was seen."""
        return math.sqrt(self.sum_of_squares / self.count_all) if self.count_all else math.nan

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file; sums are little-endian signed integers of 80 bytes."""
        sums = [int(s).to_bytes(_BYTES, "little", signed=True) for s in (*self.total, *self.energy)]
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "count": self.count,
            "nonfinite": self.nonfinite,
            "sums": np.frombuffer(b"".join(sums), np.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> Range:
        """The inverse of `to_tensors`."""
        raw = tensors["sums"].astype(np.uint8).tobytes()
        sums = [int.from_bytes(raw[i : i + _BYTES], "little", signed=True) for i in range(0, len(raw), _BYTES)]
        return cls(
            tensors["minimum"].astype(np.float32),
            tensors["maximum"].astype(np.float32),
            tensors["count"].astype(np.int64),
            tensors["nonfinite"].astype(np.int64),
            (sums[0], sums[1]),
            (sums[2], sums[3]),
        )
