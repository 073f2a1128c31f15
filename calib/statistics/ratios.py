# SPDX-License-Identifier: Apache-2.0
"""`TokenRatio`: how far the largest magnitude of a token stands above its median one, the test of Sun et al."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import EXCLUDED, GROUPS, Observation
from calib.statistics.summation import block_sum, exact_float, exact_integer

__all__ = ["MASSIVE_MAGNITUDE", "MASSIVE_RATIO", "TokenRatio"]

MASSIVE_MAGNITUDE = 100.0
"""A token is massive if its largest magnitude exceeds this ... (Sun et al., arXiv 2402.17762)"""
MASSIVE_RATIO = 1000.0
"""... and is more than this many times the median magnitude of the same token."""
_BYTES = 128  # of one exact sum: ratios stay below 2^277, their squares times 2^64 tokens below 2^618

Pair = tuple[float, float]


@dataclass(frozen=True, eq=False)
class TokenRatio:
    """Ratio of the largest to the median magnitude of each token, over its channels.

    The median of an even number of channels is the lower of the two middle values, as `torch.median` has it. A token
    that holds a NaN or an infinity is not tested. A token whose median is 0 has no ratio: it enters no mean and no
    largest ratio, and passes on its magnitude alone.

    Law: counts and sums by integer addition, `peak` and `steepest` by the larger under a total order; exact,
    commutative, associative.

    Attributes:
        tokens: int64 ``[2]`` per position group, tokens that were tested.
        passed: int64 ``[2]``, tokens with max > 100 and max / median > 1000.
        medianless: tokens whose median is 0.
        total: sum of the ratios in units of 2^-298.
        energy: sum of their squares in the same units.
        peak: (max, median) of the token with the largest magnitude; (0, 0) if there is none.
        steepest: (max, median) of the token with the largest ratio; (0, 0) if there is none.
    """

    tokens: NDArray[np.int64]
    passed: NDArray[np.int64]
    medianless: int = 0
    total: int = 0
    energy: int = 0
    peak: Pair = (0.0, 0.0)
    steepest: Pair = (0.0, 0.0)

    @classmethod
    def empty(cls) -> TokenRatio:
        """The neutral element."""
        return cls(np.zeros(GROUPS, np.int64), np.zeros(GROUPS, np.int64))

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> TokenRatio:
        """Of one batch ``[blocks, tokens, channels]``."""
        magnitudes = np.abs(values)
        middle = (values.shape[2] - 1) // 2
        median = np.partition(magnitudes, middle, axis=2)[..., middle]
        return cls.of(magnitudes.max(axis=2), median, context)

    @classmethod
    def of(cls, amax: NDArray[np.float32], median: NDArray[np.float32], context: Observation) -> TokenRatio:
        """Of the largest and the median magnitude of each token, float32 ``[blocks, tokens]`` each."""
        result = cls.empty()
        tested = (context.group != EXCLUDED) & np.isfinite(amax)
        for block, valid in enumerate(tested):
            if valid.any():
                result = result.merge(
                    cls._of_block(amax[block, valid], median[block, valid], context.group[block, valid])
                )
        return result

    @classmethod
    def _of_block(cls, amax: NDArray[np.float32], median: NDArray[np.float32], group: NDArray[np.uint8]) -> TokenRatio:
        high, middle = amax.astype(np.float64), median.astype(np.float64)
        known = middle > 0
        ratio = np.divide(high, middle, out=np.full(high.shape, np.inf), where=known)
        massive = (high > MASSIVE_MAGNITUDE) & (ratio > MASSIVE_RATIO)
        finite = np.where(known, ratio, 0.0)
        total, energy = (exact_integer(float(block_sum(v))) for v in (finite, finite * finite))
        pairs = list(zip(high.tolist(), middle.tolist(), strict=True))
        steepest = max((pairs[i] for i in np.flatnonzero(finite == finite.max())), key=_by_ratio)
        return cls(
            np.bincount(group, minlength=GROUPS).astype(np.int64),
            np.bincount(group[massive], minlength=GROUPS).astype(np.int64),
            int(np.count_nonzero(~known)),
            total,
            energy,
            max((pairs[i] for i in np.flatnonzero(high == high.max())), key=_by_magnitude),
            steepest if steepest[1] > 0 else (0.0, 0.0),
        )

    def merge(self, other: TokenRatio) -> TokenRatio:
        """Of the tokens of both."""
        return TokenRatio(
            self.tokens + other.tokens,
            self.passed + other.passed,
            self.medianless + other.medianless,
            self.total + other.total,
            self.energy + other.energy,
            max(self.peak, other.peak, key=_by_magnitude),
            max(self.steepest, other.steepest, key=_by_ratio),
        )

    @property
    def mean(self) -> float:
        """Mean ratio of the tokens that have one; 0 if none has."""
        return exact_float(self.total) / self._ratios if self._ratios else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the ratio of those tokens, with n in the denominator; 0 if there is none."""
        if not self._ratios:
            return 0.0
        return math.sqrt(max(exact_float(self.energy) / self._ratios - self.mean**2, 0.0))

    @property
    def _ratios(self) -> int:
        return int(self.tokens.sum()) - self.medianless

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file; sums are little-endian integers of 128 bytes."""
        sums = [s.to_bytes(_BYTES, "little") for s in (self.total, self.energy)]
        return {
            "tokens": self.tokens,
            "passed": self.passed,
            "medianless": np.array([self.medianless], np.int64),
            "sums": np.frombuffer(b"".join(sums), np.uint8),
            "places": np.array([*self.peak, *self.steepest], np.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> TokenRatio:
        """The inverse of `to_tensors`."""
        raw = tensors["sums"].astype(np.uint8).tobytes()
        peak, its_median, steepest, other_median = (float(v) for v in tensors["places"].astype(np.float64))
        return cls(
            tensors["tokens"].astype(np.int64),
            tensors["passed"].astype(np.int64),
            int(tensors["medianless"].astype(np.int64)[0]),
            int.from_bytes(raw[:_BYTES], "little"),
            int.from_bytes(raw[_BYTES:], "little"),
            (peak, its_median),
            (steepest, other_median),
        )


def _by_magnitude(pair: Pair) -> Pair:
    return pair[0], -pair[1]


def _by_ratio(pair: Pair) -> Pair:
    return (pair[0] / pair[1] if pair[1] > 0 else 0.0), pair[0]
