# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import UsageError
from calib.export.compressed_tensors import weight_codes
from calib.quantized.grid import IntegerGrid, dequantize, quantize
from calib.scales import Grid

FLOATS = st.floats(-1e6, 1e6, width=32)
SCALES = st.floats(2.0**-20, 2.0**10, width=32)


def exact_code(x: float, scale: float, zero_point: int, qmin: int, qmax: int, *, first: bool) -> int:
    """In exact arithmetic, but for the quotient (and its sum with the zero point), which float32 rounds once."""
    quotient = Fraction(float(np.float32(np.float32(x) / np.float32(scale))))
    if first:
        quotient = Fraction(float(np.float32(np.float32(float(quotient)) + np.float32(zero_point))))
        return min(max(round(quotient), qmin), qmax)  # `round` of a Fraction takes ties to even
    return min(max(round(quotient) + zero_point, qmin), qmax)


@given(st.lists(FLOATS, min_size=1, max_size=20), SCALES, st.integers(-128, 127), st.booleans())
def test_codes_are_those_of_exact_arithmetic(values: list[float], scale: float, zero_point: int, first: bool) -> None:
    codes = quantize(
        torch.tensor(values), torch.tensor(scale), torch.tensor(float(zero_point)), -128, 127, zero_point_first=first
    )
    assert codes.tolist() == [exact_code(x, scale, zero_point, -128, 127, first=first) for x in values]


@given(st.integers(-300, 300), st.integers(-128, 127), st.sampled_from([0.25, 0.5, 1.0, 4.0]))
def test_ties_go_to_the_even_code_before_or_after_the_zero_point(half: int, zero_point: int, scale: float) -> None:
    x = torch.tensor((half + 0.5) * scale)
    even = half if half % 2 == 0 else half + 1
    total = half + zero_point
    point = torch.tensor(float(zero_point))
    assert quantize(x, torch.tensor(scale), point, -1000, 1000) == even + zero_point
    first = quantize(x, torch.tensor(scale), point, -1000, 1000, zero_point_first=True)
    assert first == (total if total % 2 == 0 else total + 1)


def test_values_beyond_the_grid_saturate_and_nan_stays() -> None:
    x = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf, torch.nan])
    codes = quantize(x, torch.tensor(0.1), None, -127, 127)
    assert codes[:4].tolist() == [-127, -127, 127, 127]
    assert codes[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_divided_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor(0.0123)
    assert torch.equal(quantize(x, scale, None, -127, 127), quantize(x.float(), scale, None, -127, 127))


def test_scales_broadcast_per_channel_token_row_and_group() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for shape in ([8], [3, 5, 1], [3, 1, 1], []):
        scale = torch.rand(shape) + 0.01
        whole = quantize(x, scale, None, -8, 7)
        expanded = scale.expand(3, 5, 8)
        single = [quantize(a, b, None, -8, 7) for a, b in zip(x.flatten(), expanded.flatten(), strict=True)]
        assert torch.equal(whole.flatten(), torch.stack(single))


def test_dequantize_takes_the_zero_point_away_first() -> None:
    assert dequantize(torch.tensor([-3, 5], dtype=torch.int8), torch.tensor(0.5), torch.tensor(-3.0)).tolist() == [0, 4]


@given(FLOATS, FLOATS, st.integers(2, 16))
def test_symmetric_scales_are_those_of_the_scale_file(low: float, high: float, bits: int) -> None:
    ours, _ = IntegerGrid.of(bits).step(torch.tensor(low), torch.tensor(high))
    step = Grid(bits).step(min(low, 0), max(high, 0))
    assert float(ours) == (2.0**-23 if step is None else step.scale)


def test_weights_on_the_compressed_tensors_grid_equal_its_codes() -> None:
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    grid = IntegerGrid.of(8, convention="compressed-tensors")
    scale, point = grid.step(*torch.aminmax(weight, dim=1, keepdim=True))
    codes, theirs = weight_codes(weight)
    assert point is None
    assert torch.equal(scale, theirs)
    assert torch.equal(quantize(weight, scale, None, grid.qmin, grid.qmax), codes.float())


def test_asymmetric_ranges_always_hold_zero() -> None:
    scale, point = IntegerGrid.of(8, symmetric=False).step(torch.tensor([2.0, -4.0]), torch.tensor([10.0, -2.0]))
    assert point is not None
    assert point.tolist() == [-128, 127]
    assert torch.equal(scale, torch.tensor([10.0, 4.0]) / torch.tensor(255.0))


def test_bad_grids_are_refused() -> None:
    with pytest.raises(UsageError, match="bits 1"):
        IntegerGrid.of(1)
    with pytest.raises(UsageError, match="convention"):
        IntegerGrid.of(8, convention="other")  # type: ignore[arg-type]
