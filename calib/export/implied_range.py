# SPDX-License-Identifier: Apache-2.0
"""The range that a published scale stands for, such that the formula of its format gives the same scale again.

Every scale that the formula made of float32 numbers is given back. One that nothing could have led to, because float32
ranges lie further apart than float32 scales there, comes back as its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["asymmetric_range", "symmetric_range"]

# Last bits by which an end is moved: a product and a quotient are each off by half of one. The smaller end has finer
# ones, so that a width between two numbers of the larger end is reached too.
_WHOLE = range(-3, 4)
_FINE = range(-16, 17)


def symmetric_range(scale: float, intervals: float) -> float:
    """The amax with ``float32(amax / intervals) == scale``."""
    wanted, divisor = np.float32(scale), np.float32(intervals)
    start = np.float32(wanted * divisor)
    for moved in sorted(_WHOLE, key=abs):
        value = np.float32(start + moved * np.spacing(start))
        if np.float32(value / divisor) == wanted:
            return float(value)
    return float(start)


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
    low, high = (float(np.float32(scale * (code - zero_point))) for code in (-128, 127))
    bit = float(np.spacing(np.float32(max(-low, high))))
    moves = sorted(((a, b / 16) for a in _WHOLE for b in _FINE), key=lambda move: abs(move[0]) + abs(move[1]))
    for whole, fine in moves:
        of_low, of_high = (fine, whole) if high >= -low else (whole, fine)
        first = float(np.float32(min(low + of_low * bit, 0.0)))
        second = float(np.float32(max(high + of_high * bit, 0.0)))
        if grid(first, second) == wanted:
            return first, second
    return float(np.float32(low)), float(np.float32(high))
