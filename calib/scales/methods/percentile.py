# SPDX-License-Identifier: Apache-2.0
"""`percentile`: the range that holds a given share of all values.

Symmetric: of |x|. Asymmetric: half of what is left out lies at each end. Of bfloat16 data it is exact, of others linear
inside a bin. Zeros count as values; if a tensor is so sparse that only zeros remain, the whole range is taken.
"""

from __future__ import annotations

from calib.scales.distribution import Distribution
from calib.scales.grid import Grid
from calib.scales.methods.registry import Parameter, method

__all__ = ["percentile"]


@method(
    "percentile",
    summary="the range that holds a share of all values (default 99.99 %)",
    # TensorRT's and ONNX Runtime's percentile calibrators default to 99.99 and 99.999
    parameter=Parameter(default=99.99, low=50, high=100, meaning="a percentage of values to keep"),
)
def percentile(distribution: Distribution, grid: Grid, parameter: float) -> tuple[float, float]:
    """The central part of that percentage."""
    share = (100 - parameter) / 100
    if grid.symmetric:
        limit = distribution.clipped_abs(share)
        return -limit, limit
    return distribution.clipped_range(share)
