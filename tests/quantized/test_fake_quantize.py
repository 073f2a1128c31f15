# SPDX-License-Identifier: Apache-2.0
"""Gradients that look through rounding, and FP8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.quantized.fake_quantize import fake_quantize, fake_quantize_float8, lsq_gradient_scale, round_float8
from calib.quantized.grid import IntegerGrid, dequantize, quantize
from calib.quantized.quantizers import DynamicQuantizer, Float8Quantizer, StaticQuantizer
from calib.scales.float8 import float8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_point", [None, -5.0])
def test_with_and_without_gradient_the_values_are_those_of_the_codes(
    zero_point: float | None, dtype: torch.dtype, first: bool
) -> None:
    x, scale = (random(4, 16) * 3).to(dtype), torch.tensor(0.0371)
    point = None if zero_point is None else torch.tensor(zero_point)
    codes = quantize(x, scale, point, -128, 127, zero_point_first=first)
    expected = dequantize(codes, scale, point).to(dtype)
    for source in (x, x.clone().requires_grad_()):
        result = fake_quantize(source, scale, point, -128, 127, zero_point_first=first)
        assert result.dtype == dtype
        assert torch.equal(result, expected)


def test_the_input_is_never_changed() -> None:
    x = random(100)
    before = x.clone()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(3.0), -8, 7)
    fake_quantize_float8(x, torch.tensor(0.1))
    assert torch.equal(x, before)


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    x = torch.tensor([-9.0, -4.0, -0.3, 0.0, 2.6, 3.5, 3.6, 9.0], requires_grad=True)
    weights = torch.arange(1.0, 9.0)
    (fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -8, 7) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


def straight(x: torch.Tensor, scale: torch.Tensor, point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """LSQ as its authors write it, in float64: clip, then round with the gradient of the identity."""
    v = torch.clamp(x / scale, qmin - point, qmax - point)
    return ((v.round() - v).detach() + v) * scale


@pytest.mark.parametrize("shape", [(), (1, 6), (5, 1)])
def test_lsq_gradients_equal_those_of_its_formula(shape: tuple[int, ...]) -> None:
    x = random(5, 6) * 2
    scale, point = random(*shape, seed=1).abs() + 0.2, torch.full(shape, 2.0)
    upstream = random(5, 6, seed=2)
    ours = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    (fake_quantize(*ours, point, -4, 3, scale_gradient=0.25) * upstream).sum().backward()
    theirs = [x.double().requires_grad_(), scale.double().requires_grad_()]
    (straight(*theirs, point.double(), -4, 3) * upstream).sum().backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad.float())
    torch.testing.assert_close(ours[1].grad, 0.25 * theirs[1].grad.float())


def test_the_scale_gradient_of_clipped_values_is_a_finite_difference() -> None:
    """Outside of the range nothing is rounded away, so that the estimator must be exact."""
    x = torch.tensor([50.0, -60.0, 70.0])
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, None, -7, 7).sum().backward()
    h = 2.0**-6
    up, down = (fake_quantize(x, torch.tensor(0.5 + d), None, -7, 7).sum() for d in (h, -h))
    assert scale.grad == (up - down) / (2 * h)


def test_a_learned_scale_finds_a_better_one() -> None:
    x = random(4096)
    scale = torch.nn.Parameter(x.abs().max() / 7)
    quantizer = StaticQuantizer(IntegerGrid.of(4), scale, scale_gradient=lsq_gradient_scale(4096, 7))
    start = (quantizer(x) - x).square().mean().item()
    optimizer = torch.optim.Adam([scale], lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean().item() < 0.9 * start


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
def test_float8_rounds_as_the_offline_errors_assume(values: list[float]) -> None:
    found = round_float8(torch.tensor(values)).float().numpy()
    assert np.array_equal(found, float8(np.array(values, np.float32)))


def test_float8_saturates_where_a_plain_cast_gives_nan() -> None:
    x = torch.tensor([1e9, -500.0, 449.0])
    assert round_float8(x).float().tolist() == [448, -448, 448]


def test_float8_static_and_dynamic_scales_are_amax_over_448() -> None:
    x = random(3, 8)
    x[1] = 0
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1, amax / 448)
    assert torch.equal(Float8Quantizer()(x), torch.from_numpy(float8((x / scale).numpy())).float() * scale)
    whole = x.abs().max() / 448
    expected = torch.from_numpy(float8((x / whole).numpy())).float() * whole
    assert torch.equal(Float8Quantizer(None, "per-tensor")(x), expected)
    assert torch.equal(Float8Quantizer(whole)(x), expected)
    y = torch.tensor([1.0, 1000.0], requires_grad=True)
    fake_quantize_float8(y, torch.tensor(1.0)).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [1, 0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_per_token_gives_each_row_its_own_scale(symmetric: bool) -> None:
    x = random(2, 5, 16) * torch.logspace(-3, 3, 5).reshape(1, 5, 1) + 1
    x[0, 0] = 0
    grid = IntegerGrid.of(8, symmetric=symmetric)
    whole = DynamicQuantizer(grid)(x)
    for b in range(2):
        for t in range(5):
            assert torch.equal(whole[b, t], DynamicQuantizer(grid, "per-tensor")(x[b, t]))
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255 if not symmetric else x.abs().amax(-1) / 127
    assert ((whole - x).abs().amax(-1) <= step * 0.5001).all()
    assert not whole[0, 0].any()


def test_empty_tensors_pass() -> None:
    x = torch.zeros(0, 4)
    assert DynamicQuantizer(IntegerGrid.of(8))(x).shape == (0, 4)
    assert Float8Quantizer()(x).shape == (0, 4)
