# SPDX-License-Identifier: Apache-2.0
"""Paired bootstrap: how sure a difference between two models is, given that both saw the same blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import UsageError

__all__ = ["Interval", "mean_interval", "perplexity_ratio"]

DRAWS = 10_000
_LARGEST = 1 << 25


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds it with a given probability, by resampling blocks."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_interval(values: NDArray[np.float64], *, share: float = 0.9, seed: int = 0) -> Interval:
    """Mean over blocks, with a percentile interval.

    Args:
        values: float64 ``[blocks]`` or ``[blocks, tokens]``; tokens of a block are drawn together, for they are not
            independent.
        share: probability.
        seed: of the draws.

    Raises:
        UsageError: no block, or a share outside of 0..1.
    """
    if not values.size or not 0 < share < 1:
        raise UsageError(f"interval: {len(values)} blocks and a share of {share}; give blocks, and a share in 0..1")
    per_block = values.reshape(len(values), -1).mean(1)
    draws = _draws(per_block, seed)
    low, high = np.quantile(draws, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(per_block.mean()), float(low), float(high))


def perplexity_ratio(
    quantized: NDArray[np.float64], reference: NDArray[np.float64], *, share: float = 0.9, seed: int = 0
) -> Interval:
    """Perplexity of one model over that of another on the same tokens: exp of the mean paired difference.

    Args:
        quantized: negative log-likelihoods, float64 ``[blocks, tokens]``.
        reference: those of the other model.
        share: probability of the interval.
        seed: of the draws.

    Raises:
        UsageError: the shapes differ.
    """
    if quantized.shape != reference.shape:
        raise UsageError(f"ratio: {quantized.shape} and {reference.shape} scores; score the same blocks")
    found = mean_interval(quantized - reference, share=share, seed=seed)
    return Interval(*(float(np.exp(x)) for x in (found.value, found.low, found.high)))


def _draws(per_block: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of `DRAWS` resamples; of many blocks a few at a time, so that memory stays below a gigabyte."""
    random = np.random.default_rng(seed)
    at_once = max(1, _LARGEST // per_block.size)
    parts = []
    for start in range(0, DRAWS, at_once):
        picks = random.integers(0, per_block.size, (min(at_once, DRAWS - start), per_block.size))
        parts.append(per_block[picks].mean(1))
    return np.concatenate(parts)
