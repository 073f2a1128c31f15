# SPDX-License-Identifier: Apache-2.0
"""How one activation is put on a grid: static or dynamic, integer or FP8. Small frozen records that can be called."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol, Self, runtime_checkable

import torch

from calib.quantized.fake_quantize import fake_quantize, fake_quantize_float8
from calib.quantized.grid import IntegerGrid
from calib.scales.float8 import FLOAT8_MAX
from calib.scales.grid import SMALLEST_SCALE
from calib.sites.port import Axes

__all__ = ["DynamicQuantizer", "Float8Quantizer", "IntegerQuantizer", "StaticQuantizer", "TensorQuantizer"]

Granularity = Literal["per-tensor", "per-token"]


class TensorQuantizer(Protocol):
    """Rounds a tensor to its grid; shape and dtype stay."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with every value on the grid."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same with its numbers on a device."""
        ...


@runtime_checkable
class IntegerQuantizer(Protocol):
    """A `TensorQuantizer` onto integers, whose codes can be had."""

    @property
    def grid(self) -> IntegerGrid:
        """The codes."""
        ...

    def step(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point of a tensor, float32, such that they broadcast against it."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with every value on the grid."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same with its numbers on a device."""
        ...


@dataclass(frozen=True, eq=False)
class StaticQuantizer:
    """One scale that was decided before, per tensor, per channel or per head.

    Attributes:
        grid: the codes.
        scale: float32 ``[]``, ``[channels]`` or, for heads, ``[heads]``; may be a parameter that learns.
        zero_point: whole numbers in float32, the shape of ``scale``; None for 0.
        axes: layout of the tensors, says where channels are.
        scale_gradient: see `fake_quantize`.
    """

    grid: IntegerGrid
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    axes: Axes = "tokens"
    scale_gradient: float = 1.0

    def step(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point, in the shape that broadcasts against ``x``."""
        point = self.zero_point
        return _shaped(self.scale, x, self.axes), None if point is None else _shaped(point, x, self.axes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with every value on the grid."""
        scale, point = self.step(x)
        grid = self.grid
        return fake_quantize(
            x,
            scale,
            point,
            grid.qmin,
            grid.qmax,
            zero_point_first=grid.zero_point_first,
            scale_gradient=self.scale_gradient,
        )

    def to(self, device: torch.device) -> Self:
        """The same with its numbers on a device; itself if they are there."""
        if self.scale.device == device:
            return self
        point = self.zero_point
        return dataclasses.replace(
            self, scale=self.scale.to(device), zero_point=None if point is None else point.to(device)
        )


@dataclass(frozen=True)
class DynamicQuantizer:
    """A scale from each tensor itself, or from each row of its last axis ("per token"; of keys, per token and head).

    Attributes:
        grid: the codes.
        granularity: per-token or per-tensor.
    """

    grid: IntegerGrid
    granularity: Granularity = "per-token"

    def step(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point, ``[..., 1]`` or ``[]``; no gradient flows through them."""
        low, high = _extremes(x.detach(), self.granularity)
        return self.grid.step(low, high)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with every value on the grid."""
        if not x.numel():
            return x
        scale, point = self.step(x)
        grid = self.grid
        return fake_quantize(x, scale, point, grid.qmin, grid.qmax, zero_point_first=grid.zero_point_first)

    def to(self, device: torch.device) -> Self:
        """Itself: it holds no numbers."""
        return self


@dataclass(frozen=True, eq=False)
class Float8Quantizer:
    """FP8 E4M3 with scale = amax / 448.

    Attributes:
        scale: float32 ``[]`` or ``[channels]``; None: from each tensor or token itself.
        granularity: of a dynamic scale.
        axes: layout of the tensors.
    """

    scale: torch.Tensor | None = None
    granularity: Granularity = "per-token"
    axes: Axes = "tokens"

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Scale, in the shape that broadcasts against ``x``."""
        if self.scale is not None:
            return _shaped(self.scale, x, self.axes)
        low, high = _extremes(x.detach(), self.granularity)
        amax = torch.maximum(-low, high).float()
        scale = amax / torch.full_like(amax, FLOAT8_MAX)
        return torch.where(scale < SMALLEST_SCALE, 1.0, scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with every value on the grid."""
        return fake_quantize_float8(x, self.step(x)) if x.numel() else x

    def to(self, device: torch.device) -> Self:
        """The same with its numbers on a device; itself if they are there."""
        if self.scale is None or self.scale.device == device:
            return self
        return dataclasses.replace(self, scale=self.scale.to(device))


def _extremes(x: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    if granularity == "per-token":
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
    else:
        low, high = torch.aminmax(x)
    return low, high


def _shaped(numbers: torch.Tensor, x: torch.Tensor, axes: Axes) -> torch.Tensor:
    """Numbers per channel or head in the shape that broadcasts against a tensor of a layout."""
    if numbers.ndim == 0 or axes == "tokens":
        return numbers
    if axes == "heads" and x.ndim == 4:
        return numbers.view(1, x.shape[1], 1, -1)
    return numbers.view(1, -1, *[1] * (x.ndim - 2))
