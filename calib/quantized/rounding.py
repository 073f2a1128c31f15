# SPDX-License-Identifier: Apache-2.0
"""From a weight to its codes: to the nearest, each value by itself."""

from __future__ import annotations

import torch

from calib.quantized.fake_quantize import round_float8
from calib.quantized.grid import quantize
from calib.quantized.weights import QuantizedWeight, WeightScheme

__all__ = ["round_to_nearest"]


def round_to_nearest(weight: torch.Tensor, scheme: WeightScheme, name: str = "weight") -> QuantizedWeight:
    """Rounds every value to the nearest code, ties to even.

    Args:
        weight: floating point ``[outputs, inputs]``.
        scheme: its grid.
        name: for errors.

    Raises:
        UsageError: the group size does not divide the inputs.
    """
    grouped = scheme.grouped(weight.detach(), name)
    scale, point = scheme.step(grouped)
    grid = scheme.grid
    if grid is None:
        return QuantizedWeight(round_float8(grouped.float() / scale).flatten(1), scale.squeeze(-1))
    codes = quantize(grouped, scale, point, grid.qmin, grid.qmax, zero_point_first=grid.zero_point_first)
    dtype = torch.int8 if grid.qmin >= -128 and grid.qmax <= 127 else torch.int16
    return QuantizedWeight(codes.flatten(1).to(dtype), scale.squeeze(-1), None if point is None else point.squeeze(-1))
