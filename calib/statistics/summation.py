# SPDX-License-Identifier: Apache-2.0
"""Sums that come out bit-equal whatever the batch, the shard, the thread or the device.

Floating-point addition is not associative, so calib fixes the order *inside* a block and adds *between* blocks exactly.

Inside a block the tokens of one group are taken in order, as float64, and cut in units of 128 tokens and groups of 8.
Each group of 8 is added pairwise, ((0+1)+(2+3))+((4+5)+(6+7)); the 16 groups of a unit one after the other; the units
of a block pairwise again. Missing tokens count as zero. This order vectorises on all devices; every kernel follows it.

Between blocks, a partial sum is an integer multiple of a fixed step, so that addition is integer addition:

* `exact_integer`: Python integers in units of 2^-298, the square of the smallest float32. Nothing is lost.
* `FixedPoint`: for one sum of squares per channel, 121 bits in two int64, step 2^-52. A block's partial is
  rounded to the step (absolute error <= 2^-53 per block). A partial of 2^68 or more, and a sum of 2^69 or more,
  saturates and reads as infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GROUP_TOKENS",
    "UNIT_TOKENS",
    "FixedPoint",
    "block_sum",
    "exact_float",
    "exact_integer",
    "pairwise_sum",
]

UNIT_TOKENS = 128
GROUP_TOKENS = 8
_EXACT_SHIFT = 298
_LOW_BITS = 60
_STEP_BITS = 52
_SATURATED = 1 << 61


def pairwise_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adds ``[n, ...]`` along its first axis by neighbours: (0+1)+(2+3)+...; zeros stand in for missing terms."""
    while values.shape[0] > 1:
        if values.shape[0] % 2:
            values = np.concatenate([values, np.zeros_like(values[:1])])
        values = values[0::2] + values[1::2]
    return values[0] if values.shape[0] else np.zeros(values.shape[1:], np.float64)


def block_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adds the tokens ``[tokens, ...]`` of one block in the order that the module docstring fixes."""
    tokens, *rest = values.shape
    units = -(-tokens // UNIT_TOKENS)
    padded = np.zeros((units * UNIT_TOKENS, *rest), np.float64)
    padded[:tokens] = values
    groups = padded.reshape(units, UNIT_TOKENS // GROUP_TOKENS, GROUP_TOKENS, *rest)
    while groups.shape[2] > 1:
        groups = groups[:, :, 0::2] + groups[:, :, 1::2]
    total = np.zeros((units, *rest), np.float64)
    for index in range(groups.shape[1]):
        total = total + groups[:, index, 0]
    return pairwise_sum(total)


def exact_integer(partial: float) -> int:
    """A float64 sum of float32 numbers or of their squares as a multiple of 2^-298, exactly."""
    return int(math.ldexp(partial, _EXACT_SHIFT))


def exact_float(total: int) -> float:
    """The float64 nearest to a multiple of 2^-298."""
    try:
        return total / (1 << _EXACT_SHIFT)
    except OverflowError:
        return -math.inf if total < 0 else math.inf


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Non-negative sums, ``(high * 2^60 + low) * 2^-52``; addition is exact, commutative and associative.

    Attributes:
        high: int64, any shape; saturated at 2^61.
        low: int64, the same shape, 0 <= low < 2^60.
    """

    high: NDArray[np.int64]
    low: NDArray[np.int64]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> FixedPoint:
        """The neutral element."""
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    @classmethod
    def of(cls, partial: NDArray[np.float64]) -> FixedPoint:
        """One non-negative partial sum per element, rounded to the step."""
        saturated = ~(partial < 2.0**68)
        scaled = np.where(saturated, 0.0, partial) * 2.0**_STEP_BITS
        high = np.trunc(scaled * 2.0**-_LOW_BITS)
        low = np.rint(scaled - high * 2.0**_LOW_BITS).astype(np.int64)
        return cls(np.where(saturated, _SATURATED, high.astype(np.int64)), np.where(saturated, 0, low))

    def __add__(self, other: FixedPoint) -> FixedPoint:
        low = self.low + other.low
        high = self.high + other.high + (low >> _LOW_BITS)
        saturated = high >= _SATURATED
        return FixedPoint(np.where(saturated, _SATURATED, high), np.where(saturated, 0, low & ((1 << _LOW_BITS) - 1)))

    def to_float(self) -> NDArray[np.float64]:
        """The sums as float64; infinite where saturated."""
        value = self.high.astype(np.float64) * 2.0 ** (_LOW_BITS - _STEP_BITS)
        value += self.low.astype(np.float64) * 2.0**-_STEP_BITS
        return np.where(self.high >= _SATURATED, np.inf, value)
