# SPDX-License-Identifier: Apache-2.0
"""Searches for the ends of a range that minimise an objective, coarse to fine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from calib.scales.magnitudes import Floats, Magnitudes

__all__ = ["around", "candidates", "descend"]

Objective = Callable[[Floats, Floats], Floats]
"""From lower ends ``[n]`` and upper ends ``[n]`` to costs ``[n]``."""


def candidates(side: Magnitudes, number: int) -> Floats:
    """Possible ends of a range, geometric from the median of one side to its top, ascending; 0 alone if it is empty."""
    if not side.value.size:
        return np.zeros(1)
    median = side.at_rank((side.total + 1) // 2)
    ends = np.geomspace(median, side.top, number)
    ends[-1] = side.top
    return ends


def around(end: float, spread: float, number: int, top: float) -> Floats:
    """Candidates around one of them, geometric within a factor, none beyond the top."""
    if end <= 0:
        return np.array([end])
    return np.unique(np.minimum(end * np.geomspace(1 / spread, spread, number), top))


def descend(objective: Objective, low: float, high: float, lows: Floats, highs: Floats) -> tuple[float, float]:
    """One sweep of coordinate descent: the best upper end for this lower end, then the best lower end for that.

    The pair that came in is among the candidates, so the cost never grows.
    """
    highs = np.append(highs, high)
    high = float(highs[np.argmin(objective(np.full(highs.size, low), highs))])
    lows = np.append(lows, low)
    low = float(lows[np.argmin(objective(lows, np.full(lows.size, high)))])
    return low, high
