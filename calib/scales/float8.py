# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3: what a tensor would lose on that grid, beside the integer grids.

E4M3FN has 4 exponent and 3 mantissa bits, steps of 2^-9 below 2^-6, saturates at 448 and rounds ties to even. Its scale
is amax / 448, as compressed-tensors, ModelOpt and vLLM compute it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.scales.distribution import Distribution
from calib.scales.error import ErrorSums
from calib.scales.grid import SMALLEST_SCALE
from calib.schema.scales import ExpectedError

__all__ = ["FLOAT8_MAX", "float8", "float8_error"]

FLOAT8_MAX = 448.0
_SMALLEST_EXPONENT = -6
_MANTISSA_BITS = 3
_POINTS = np.array([0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2])  # Gauss: right for the mean of a square


def float8(x: NDArray[Any]) -> NDArray[np.float64]:
    """Values rounded to E4M3FN and saturated, float64, same shape."""
    values = np.asarray(x, np.float64)
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - 1, _SMALLEST_EXPONENT) - _MANTISSA_BITS)
    return np.asarray(np.clip(np.rint(values / step) * step, -FLOAT8_MAX, FLOAT8_MAX))


def float8_error(distribution: Distribution) -> ExpectedError:
    """Error with scale = amax / 448: exact for bfloat16 data, else at two points of each bin.

    A bin is 1/16 of an E4M3 step or less, so two points stand for it well.
    """
    side, amax = distribution.folded, distribution.amax
    scale = float(np.float32(amax / FLOAT8_MAX))
    if scale < SMALLEST_SCALE:
        return ErrorSums().of(distribution)
    inside = np.zeros(1) if side.exact else _POINTS
    points = side.low + inside[:, None] * (side.high - side.low)
    rounded = float8(points / scale) * scale
    error = np.abs(rounded - points)
    squares, body = side.count * np.square(error).mean(axis=0), distribution.body_size(side)
    return ErrorSums(
        body=float(squares[:body].sum()),
        peak=float(squares[body:].sum()),
        absolute=float(np.dot(side.count, error.mean(axis=0))),
        zeroed=float(np.dot(side.count, (rounded == 0).mean(axis=0))),
    ).of(distribution)
