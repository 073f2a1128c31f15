# SPDX-License-Identifier: Apache-2.0
"""Rounding to a grid that training can see through: a straight-through estimator, and LSQ for the scale.

Straight-through (Bengio et al. 2013): the gradient passes where the value lies on the grid's range and is 0 where it
is clipped. Learned step size (Esser et al. 2020, "Learned Step Size Quantization", eq. 3): with v = x / scale and the
codes counted from the zero point, d(result)/d(scale) is rint(v) - v inside, and the code of the nearer end outside.
"""

from __future__ import annotations

from typing import Any

import torch

from calib.quantized.grid import dequantize, quantize
from calib.scales.float8 import FLOAT8_MAX

__all__ = ["fake_quantize", "fake_quantize_float8", "lsq_gradient_scale", "round_float8"]


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    *,
    zero_point_first: bool = False,
    scale_gradient: float = 1.0,
) -> torch.Tensor:
    """Values rounded to their grid: `dequantize(quantize(x))` in float32, returned in the dtype of ``x``.

    Args:
        x: floating point, any shape.
        scale: float32, broadcast against ``x``; gets a gradient (LSQ) if it requires one.
        zero_point: whole numbers in float32, or None for 0; gets no gradient.
        qmin: first code.
        qmax: last code.
        zero_point_first: see `IntegerGrid`.
        scale_gradient: factor on the gradient of the scale, see `lsq_gradient_scale`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result: torch.Tensor = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, zero_point_first, scale_gradient)
        return result
    codes = quantize(x, scale, zero_point, qmin, qmax, zero_point_first=zero_point_first)
    if zero_point is not None:
        codes.sub_(zero_point)
    return codes.mul_(scale).to(x.dtype)


def fake_quantize_float8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values rounded to FP8 E4M3 times ``scale`` (float32, broadcast), saturating at 448; gradient as above."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: torch.Tensor = _FakeQuantizeFloat8.apply(x, scale)
        return result
    return (round_float8(x.float() / scale).float() * scale).to(x.dtype)


def round_float8(x: torch.Tensor) -> torch.Tensor:
    """Float32 values in ``torch.float8_e4m3fn``, ties to even; beyond 448, where a plain cast gives NaN, saturated."""
    return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def lsq_gradient_scale(values: int, qmax: int) -> float:
    """1 / sqrt(values * qmax), which keeps steps of scale and weights comparable (Esser et al. 2020, section 2.2).

    Args:
        values: how many values share one scale.
        qmax: last code.
    """
    return float((values * qmax) ** -0.5)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        qmin: int,
        qmax: int,
        zero_point_first: bool,
        scale_gradient: float,
    ) -> torch.Tensor:
        codes = quantize(x, scale, zero_point, qmin, qmax, zero_point_first=zero_point_first)
        position = x.float() / scale
        shifted = position if zero_point is None else position + zero_point
        inside = (shifted >= qmin) & (shifted <= qmax)
        slope = None
        if ctx.needs_input_grad[1]:
            slope = codes if zero_point is None else codes - zero_point
            slope = torch.where(inside, slope - position, slope)
        ctx.save_for_backward(inside, slope)
        ctx.scale_shape, ctx.scale_gradient = scale.shape, scale_gradient
        return dequantize(codes, scale, zero_point).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        inside, slope = ctx.saved_tensors
        (gradient,) = gradients
        of_scale = None
        if slope is not None:
            of_scale = (gradient.float() * slope).sum_to_size(ctx.scale_shape) * ctx.scale_gradient
        return gradient * inside if ctx.needs_input_grad[0] else None, of_scale, None, None, None, None, None


class _FakeQuantizeFloat8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        position = x.float() / scale
        ctx.save_for_backward(position.abs() <= FLOAT8_MAX)
        return (round_float8(position).float() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None
