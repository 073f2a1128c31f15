# SPDX-License-Identifier: Apache-2.0
"""Measures the weights of a model, once, with the kernels that measure activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from calib.kernels import Kernel, make_kernel
from calib.kernels.plan import RowPlan
from calib.measurement.site import WeightSite
from calib.sites import Weight, find_weights
from calib.statistics import Observation, WeightStatistics

__all__ = ["measure_weights"]


def measure_weights(model: nn.Module, *, kernel: str = "auto", threads: int = 1) -> dict[str, WeightSite]:
    """Statistics of all weights of projections and embeddings, by ``fqn:weight`` in module order."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    chosen = make_kernel(kernel, device=device, threads=threads)
    try:
        return {weight.name: _measured(weight, chosen) for weight in find_weights(model)}
    finally:
        chosen.close()


def _measured(weight: Weight, kernel: Kernel) -> WeightSite:
    matrix = weight.matrix.float()
    accumulator = kernel.accumulator(matrix.shape[1])
    # rows of the matrix in the place of tokens, so that channels are input columns
    accumulator.update(matrix.unsqueeze(0), RowPlan.of(Observation.of_shape(1, matrix.shape[0])))
    result = accumulator.result()
    assert result.channels is not None
    assert result.histogram is not None
    low, high = torch.aminmax(matrix, dim=1) if matrix.device.type != "cpu" else (matrix.amin(1), matrix.amax(1))
    statistics = WeightStatistics(
        row_min=low.cpu().numpy().astype(np.float32),
        row_max=high.cpu().numpy().astype(np.float32),
        column_amax=result.channels.amax,
        range=result.range,
        histogram=result.histogram,
        shape=tuple(weight.parameter.shape),
    )
    dtype = str(weight.parameter.dtype).removeprefix("torch.")
    return WeightSite(weight.name, weight.module, weight.layer, dtype, weight.tied, statistics)
