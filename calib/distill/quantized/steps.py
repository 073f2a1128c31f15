# SPDX-License-Identifier: Apache-2.0
"""Steps that are learned with the weights: LSQ, where the step itself is, and PACT, where the clip is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from calib.quantized import IntegerGrid, WeightScheme
from calib.quantized.fake_quantize import fake_quantize, lsq_gradient_scale
from calib.quantized.quantizers import StaticQuantizer
from calib.sites.port import Axes

__all__ = ["SMALLEST_STEP", "PactQuantizer", "learned_activation", "learned_weight", "start_of"]

SMALLEST_STEP = 1e-8


@dataclass(frozen=True, eq=False)
class PactQuantizer:
    """Clips to ±clip, then rounds to the grid whose last code is the clip (Choi et al. 2018, eq. 1-3, both signs).

    The gradient of the clip is the sum over clipped values of theirs, with their sign; rounding passes gradients on.

    Attributes:
        grid: symmetric.
        clip: float32 `[]`, a parameter.
    """

    grid: IntegerGrid
    clip: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor with every value on the grid."""
        clipped = torch.minimum(torch.maximum(x.float(), -self.clip), self.clip)
        step = self.clip.detach() / self.grid.qmax
        return fake_quantize(clipped, step, None, self.grid.qmin, self.grid.qmax).to(x.dtype)

    def to(self, device: torch.device) -> Self:
        """Itself: a parameter lives where its model does."""
        return self


def start_of(x: Tensor, qmax: int) -> Tensor:
    """First step, 2 mean|x| / sqrt(qmax) (Esser et al. 2020, section 2.1), float32, one per row of `[rows, values]`."""
    mean: Tensor = x.detach().float().abs().mean(dim=-1)
    return (2 * mean * float(qmax**-0.5)).clamp(min=SMALLEST_STEP)


def learned_activation(grid: IntegerGrid, step: nn.Parameter, values: int, axes: Axes) -> StaticQuantizer:
    """An activation with a learned step.

    Args:
        grid: symmetric.
        step: float32 `[]`.
        values: of one sample, for the scale of the gradient.
        axes: layout of the tensor.
    """
    return StaticQuantizer(grid, step, None, axes, scale_gradient=lsq_gradient_scale(values, grid.qmax))


def learned_weight(grid: IntegerGrid, step: nn.Parameter, values: int) -> WeightScheme:
    """A weight with a learned step for each output row.

    Args:
        grid: symmetric.
        step: float32 `[outputs]`.
        values: of one row, for the scale of the gradient.
    """
    return WeightScheme(grid, "per-row", scale=step, scale_gradient=lsq_gradient_scale(values, grid.qmax))
