# SPDX-License-Identifier: Apache-2.0
"""`absmax`: the whole observed range. Nothing is clipped; a single peak sets the step for all."""

from __future__ import annotations

from calib.scales.distribution import Distribution
from calib.scales.grid import Grid
from calib.scales.methods.registry import method

__all__ = ["absmax"]


@method("absmax", summary="the whole observed range: nothing is clipped", needs_histogram=False)
def absmax(distribution: Distribution, grid: Grid, parameter: float) -> tuple[float, float]:
    """The extremes."""
    del grid, parameter
    return distribution.minimum, distribution.maximum
