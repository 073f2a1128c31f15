# SPDX-License-Identifier: Apache-2.0
"""Measured error: the same figures as the expected error, computed directly on a tensor.

The definitions that the closed forms are tested against, and the tool for tensors that are at hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.scales.distribution import BODY
from calib.scales.error import decibels, saturation_slack
from calib.schema.scales import ExpectedError
from calib.statistics.histogram import bfloat16_bins, bin_values

__all__ = ["body_mask", "error_between", "measured_error", "quantized"]


def quantized(
    x: NDArray[Any], scale: float | NDArray[Any], zero_point: int = 0, qmin: int = -127, qmax: int = 127
) -> NDArray[np.float64]:
    """Quantized and reconstructed values, float64, same shape; `scale` may broadcast."""
    level = np.clip(np.rint(x.astype(np.float64) / scale) + zero_point, qmin, qmax)
    result: NDArray[np.float64] = (level - zero_point) * scale
    return result


def body_mask(x: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values belong to the body v1: bins of |x| up to the 0.999 quantile of the tensor's own histogram."""
    magnitude = bin_values(bfloat16_bins(np.abs(x).astype(np.float32)))
    rank = max(1, int(np.ceil(BODY * magnitude.size - 1e-9)))
    limit = np.partition(magnitude.ravel(), rank - 1)[rank - 1]
    return np.asarray(magnitude <= limit)


def measured_error(
    x: NDArray[Any], scale: float, zero_point: int = 0, qmin: int = -127, qmax: int = 127
) -> ExpectedError:
    """Error of a uniform grid on a tensor of any shape, in float64."""
    slack = saturation_slack(qmin, qmax)
    level = x.astype(np.float64) / scale + zero_point
    clipped = (level > qmax + slack) | (level < qmin - slack)
    return error_between(x, quantized(x, scale, zero_point, qmin, qmax), clipped)


def error_between(
    x: NDArray[Any], reconstructed: NDArray[Any], clipped: NDArray[np.bool_] | None = None
) -> ExpectedError:
    """Error of any reconstruction of a tensor; `clipped` marks the values that it could not represent."""
    exact = x.astype(np.float64)
    error, body = reconstructed - exact, body_mask(x)
    magnitude = float(np.abs(exact).sum())
    return ExpectedError(
        sqnr_db=decibels(float(np.square(exact).sum()), float(np.square(error).sum())),
        body_sqnr_db=decibels(float(np.square(exact[body]).sum()), float(np.square(error[body]).sum())),
        peak_sqnr_db=decibels(float(np.square(exact[~body]).sum()), float(np.square(error[~body]).sum())),
        rel_mae=float(np.abs(error).sum()) / magnitude if magnitude > 0 else 0.0,
        clipped=0.0 if clipped is None else float(clipped.mean()),
        zeroed=float(((exact != 0) & (reconstructed == 0)).mean()),
    )
