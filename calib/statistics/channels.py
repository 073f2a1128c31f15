# SPDX-License-Identifier: Apache-2.0
"""`ChannelStatistics`: extremes and energy of every channel, for smoothing, per-channel scales and importance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import GROUPS, Observation
from calib.statistics.summation import FixedPoint, block_sum

__all__ = ["ChannelStatistics"]


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Per channel and position group; index 0 is the body of a block, 1 its sink positions.

    Law: extremes by min and max, energy by addition of `FixedPoint`; exact, commutative, associative.

    Attributes:
        minimum: float32 ``[2, channels]``; +inf while nothing was seen.
        maximum: float32 ``[2, channels]``; -inf while nothing was seen.
        energy: sum of x^2, ``[2, channels]``.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    energy: FixedPoint

    @classmethod
    def empty(cls, channels: int) -> ChannelStatistics:
        """The neutral element for tensors of that many channels."""
        shape = (GROUPS, channels)
        return cls(np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32), FixedPoint.zeros(shape))

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> ChannelStatistics:
        """Of one batch ``[blocks, tokens, channels]``: the definition that kernels are tested against."""
        result = cls.empty(values.shape[2])
        for block, groups in zip(values, context.group, strict=True):
            one = cls.empty(values.shape[2])
            partial = np.zeros(one.minimum.shape, np.float64)
            for group in range(GROUPS):
                rows = block[groups == group]
                finite = np.isfinite(rows)
                kept = np.where(finite, rows, np.float32(0)).astype(np.float64)
                one.minimum[group] = rows.min(axis=0, initial=np.inf, where=finite) + np.float32(0)
                one.maximum[group] = rows.max(axis=0, initial=-np.inf, where=finite) + np.float32(0)
                partial[group] = block_sum(kept * kept)
            result = result.merge(cls(one.minimum, one.maximum, FixedPoint.of(partial)))
        return result

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Of both sets of values.

        Raises:
            ValueError: the numbers of channels differ.
        """
        if self.minimum.shape != other.minimum.shape:
            raise ValueError(f"{self.minimum.shape[1]} channels do not merge with {other.minimum.shape[1]}")
        return ChannelStatistics(
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.energy + other.energy,
        )

    def of(self, group: int) -> ChannelStatistics:
        """The same statistics with the other group emptied."""
        keep = (np.arange(GROUPS) == group)[:, None]
        return ChannelStatistics(
            np.where(keep, self.minimum, np.float32(np.inf)),
            np.where(keep, self.maximum, np.float32(-np.inf)),
            FixedPoint(np.where(keep, self.energy.high, 0), np.where(keep, self.energy.low, 0)),
        )

    @property
    def sum_of_squares(self) -> NDArray[np.float64]:
        """float64 ``[2, channels]``."""
        return self.energy.to_float()

    @property
    def amax(self) -> NDArray[np.float32]:
        """Largest magnitude of each channel over both groups, float32 ``[channels]``; 0 where nothing was seen."""
        amax: NDArray[np.float32] = np.maximum(self.maximum, -self.minimum).max(axis=0)
        return np.maximum(amax, np.float32(0))

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file, each ``[2, channels]``."""
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "energy_high": self.energy.high,
            "energy_low": self.energy.low,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> ChannelStatistics:
        """The inverse of `to_tensors`; flat arrays are accepted."""
        rows = {name: array.reshape(GROUPS, -1) for name, array in tensors.items()}
        energy = FixedPoint(rows["energy_high"].astype(np.int64), rows["energy_low"].astype(np.int64))
        return cls(rows["minimum"].astype(np.float32), rows["maximum"].astype(np.float32), energy)
