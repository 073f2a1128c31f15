# SPDX-License-Identifier: Apache-2.0
"""The range that a published scale stands for, such that the formula of its format gives the same scale again.

Every scale that the formula made of float32 numbers is given back. One that nothing could have led to, because float32
ranges lie further apart than float32 scales there, comes back as its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["asymmetric_range", "symmetric_range"]

_STEPS = 8  # float32 neighbours that are tried on either side


def symmetric_range(scale: float, intervals: float) -> float:
    """The amax with ``float32(amax / intervals) == scale``."""
    divisor = np.float32(intervals)
    start = np.float32(np.float32(scale) * divisor)
    return _nearest(start, lambda value: float(np.float32(value / divisor)) == float(np.float32(scale)))


def asymmetric_range(
    scale: float, zero_point: int, grid: Callable[[float, float], tuple[float, int]]
) -> tuple[float, float]:
    """Ends low <= 0 <= high, float32 numbers, of which a formula makes this scale and this code of 0 on -128..127.

    Args:
        scale: float32 number.
        zero_point: -128 to 127.
        grid: (low, high) -> (scale, zero point), as the format computes it.
    """
    wanted = (float(np.float32(scale)), zero_point)
    low = float(np.float32(scale * (-128 - zero_point)))
    high = float(np.float32(scale * (127 - zero_point)))
    if high >= -low:
        return low, _nearest(np.float32(high), lambda value: grid(low, float(value)) == wanted)
    return _nearest(np.float32(low), lambda value: grid(float(value), high) == wanted), high


def _nearest(start: np.float32, fits: Callable[[np.float32], bool]) -> float:
    """The float32 number nearest to a start that fits; the start if none near it does."""
    below = above = start
    for _ in range(_STEPS):
        for value in (below, above):
            if fits(value):
                return float(value)
        below = np.nextafter(below, np.float32(-np.inf), dtype=np.float32)
        above = np.nextafter(above, np.float32(np.inf), dtype=np.float32)
    return float(start)
