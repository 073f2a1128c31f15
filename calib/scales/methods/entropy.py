# SPDX-License-Identifier: Apache-2.0
"""`entropy`: the range whose quantized histogram diverges least from the original, in the spirit of TensorRT.

What is compared is defined in `calib.scales.divergence`. Candidates are geometric from the median magnitude to the
largest. Asymmetric grids first clip both ends at the same magnitude, then search pairs of ends around the best.
"""

from __future__ import annotations

import numpy as np

from calib.scales.distribution import Distribution
from calib.scales.divergence import divergences
from calib.scales.grid import Grid
from calib.scales.magnitudes import Floats
from calib.scales.methods.registry import method
from calib.scales.methods.search import around, candidates

__all__ = ["entropy"]


@method("entropy", summary="the range whose quantized histogram has the smallest KL divergence")
def entropy(distribution: Distribution, grid: Grid, parameter: float) -> tuple[float, float]:
    """Searches both ends, or one where the grid is symmetric."""
    del parameter
    if grid.symmetric:
        side = distribution.folded
        ends = candidates(side, 40)
        best = ends[_best_end(distribution, grid, ends)]
        ends = around(float(best), float((ends[-1] / ends[0]) ** (1 / 39)), 9, distribution.amax)
        best = ends[_best_end(distribution, grid, ends)]
        return -float(best), float(best)

    def cost(lows: Floats, highs: Floats) -> Floats:
        scales = ((highs - lows) / grid.intervals).astype(np.float32).astype(np.float64)
        scales = np.maximum(scales, np.finfo(np.float32).smallest_subnormal)
        points = np.clip(np.rint(grid.qmin - lows / scales), grid.qmin, grid.qmax)
        parts = [(distribution.positive, grid.qmax - points), (distribution.negative, points - grid.qmin)]
        return divergences(parts, scales)

    # both ends at the same magnitude first: one end alone cannot leave the trap that a spike at the other end sets
    below, above = distribution.negative, distribution.positive
    ends = candidates(distribution.folded, 28)
    lows, highs = -np.minimum(ends, below.top), np.minimum(ends, above.top)
    best = int(np.argmin(cost(lows, highs)))
    for spread in (2.0, 1.2):
        low, high = float(lows[best]), float(highs[best])
        pairs = np.meshgrid(-around(-low, spread, 5, below.top), around(high, spread, 5, above.top))
        lows, highs = np.append(pairs[0], low), np.append(pairs[1], high)
        best = int(np.argmin(cost(lows, highs)))
    return float(lows[best]), float(highs[best])


def _best_end(distribution: Distribution, grid: Grid, ends: Floats) -> int:
    scales = (ends / grid.qmax).astype(np.float32).astype(np.float64)
    scales = np.maximum(scales, np.finfo(np.float32).smallest_subnormal)
    limits = np.full(ends.size, float(grid.qmax))
    return int(np.argmin(divergences([(distribution.folded, limits)], scales)))
