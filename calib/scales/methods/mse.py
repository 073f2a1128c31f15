# SPDX-License-Identifier: Apache-2.0
"""`mse`: the range with the smallest expected squared error.

A coarse scan uses three running sums: what is below half a step is lost whole, what is inside has s^2 / 12, what is
beyond its distance to the end. The exact error then decides in the neighbourhood of the best, and against the whole
range, so that the result is never worse than absmax.
"""

from __future__ import annotations

import numpy as np

from calib.scales.distribution import Distribution
from calib.scales.error import sides, square_error
from calib.scales.grid import Grid
from calib.scales.magnitudes import Floats, Magnitudes
from calib.scales.methods.registry import method
from calib.scales.methods.search import around, candidates, descend

__all__ = ["mse"]


@method("mse", summary="the range with the smallest expected squared error")
def mse(distribution: Distribution, grid: Grid, parameter: float) -> tuple[float, float]:
    """Searches both ends, or one where the grid is symmetric."""
    del parameter
    return _symmetric(distribution, grid) if grid.symmetric else _both(distribution, grid)


def _symmetric(distribution: Distribution, grid: Grid) -> tuple[float, float]:
    spread, number = _neighbourhood(grid, 15, 61)
    side, top = distribution.folded, distribution.amax

    def cost(end: float) -> float:
        step = grid.step(-end, end)
        return square_error(side, step.scale, grid.qmax) if step else np.inf

    scan = candidates(side, 192)
    best = float(scan[np.argmin(_rough_inside(side, scan / grid.qmax, scan) + _rough_beyond(side, scan))])
    for width, points in ((spread, number), (spread ** (2.0 / number), 7)):
        ends = np.append(around(best, width, points, top), top)
        best = float(ends[np.argmin([cost(end) for end in ends])])
    return -best, best


def _both(distribution: Distribution, grid: Grid) -> tuple[float, float]:
    spread, number = _neighbourhood(grid, 9, 21)
    below, above = distribution.negative, distribution.positive

    def cost(lows: Floats, highs: Floats) -> Floats:
        result = np.full(lows.size, np.inf)
        for index, (low, high) in enumerate(zip(lows, highs, strict=True)):
            step = grid.step(low, high)
            if step:
                parts = sides(distribution, step.zero_point, grid.qmin, grid.qmax)
                result[index] = sum(square_error(side, step.scale, limit) for side, limit in parts)
        return result

    lows, highs = candidates(below, 40), candidates(above, 40)
    scale = np.add.outer(lows, highs) / grid.intervals
    rough = _rough_inside(below, scale, lows[:, None]) + _rough_inside(above, scale, highs[None, :])
    rough += np.add.outer(_rough_beyond(below, lows), _rough_beyond(above, highs))
    row, column = np.unravel_index(int(np.argmin(rough)), rough.shape)
    low, high = -float(lows[row]), float(highs[column])
    for width, points in ((spread, number), (spread ** (2.0 / number), 5)):
        low, high = descend(
            cost, low, high, -around(-low, width, points, below.top), around(high, width, points, above.top)
        )
    pairs = np.array([[low, high], [min(distribution.minimum, 0.0), max(distribution.maximum, 0.0)]])
    low, high = pairs[np.argmin(cost(pairs[:, 0], pairs[:, 1]))]
    return float(low), float(high)


def _neighbourhood(grid: Grid, few: int, many: int) -> tuple[float, int]:
    """How far to look around the best of the coarse scan, and at how many ends."""
    # s^2 / 12 is a poor guide where there are only a few levels: look further then, evaluating each costs less
    return (1.5, few) if grid.bits >= 6 else (4.0, many)


def _rough_inside(side: Magnitudes, scale: Floats, end: Floats) -> Floats:
    lost = np.searchsorted(side.value, scale / 2, side="right")
    inside = np.searchsorted(side.value, end, side="right")
    rounded = np.maximum(side.counts_below[inside] - side.counts_below[lost], 0.0)
    return side.squares_below[lost] + rounded * scale * scale / 12


def _rough_beyond(side: Magnitudes, end: Floats) -> Floats:
    number, first, second = (m[np.searchsorted(side.value, end, side="right")] for m in side.moments_above)
    return np.maximum(second - 2 * end * first + end * end * number, 0.0)
