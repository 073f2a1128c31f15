# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import UsageError
from calib.scales import Grid
from calib.scales.grid import SMALLEST_SCALE

BITS = st.integers(2, 16)
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)


@pytest.mark.parametrize(("bits", "qmin", "qmax"), [(2, -1, 1), (4, -7, 7), (8, -127, 127), (16, -32767, 32767)])
def test_symmetric_levels_are_narrow(bits: int, qmin: int, qmax: int) -> None:
    assert (Grid(bits).qmin, Grid(bits).qmax) == (qmin, qmax)


@pytest.mark.parametrize(("bits", "qmin", "qmax"), [(2, -2, 1), (8, -128, 127), (16, -32768, 32767)])
def test_asymmetric_levels_are_all(bits: int, qmin: int, qmax: int) -> None:
    assert (Grid(bits, False).qmin, Grid(bits, False).qmax) == (qmin, qmax)


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_bits_out_of_range_are_a_usage_error(bits: int) -> None:
    with pytest.raises(UsageError, match=f"^bits {bits}: .*; choose 2 to 16$"):
        Grid(bits)


def test_int8_scale_is_amax_over_127() -> None:
    step = Grid(8).step(-3.0, 12.7)
    assert step is not None
    assert step.scale == float(np.float32(np.float32(12.7) / 127.0))
    assert (step.low, step.high, step.zero_point) == (-float(np.float32(12.7)), float(np.float32(12.7)), 0)
    assert Grid(8).formula == "max(|range|)/127"


def test_asymmetric_range_is_extended_to_hold_zero() -> None:
    step = Grid(8, False).step(2.0, 5.1)
    assert step is not None
    assert (step.low, step.zero_point) == (0.0, -128)
    step = Grid(8, False).step(-5.1, -2.0)
    assert step is not None
    assert (step.high, step.zero_point) == (0.0, 127)


@given(low=FLOATS, high=FLOATS, bits=BITS, symmetric=st.booleans())
def test_every_scale_is_usable_and_derivable_from_its_range(
    low: float, high: float, bits: int, symmetric: bool
) -> None:
    grid = Grid(bits, symmetric)
    step = grid.step(min(low, high), max(low, high))
    if step is None:
        assert max(abs(low), abs(high)) < 2 * SMALLEST_SCALE * (grid.qmax - grid.qmin)
        return
    assert SMALLEST_SCALE <= step.scale < np.inf
    assert float(np.float32(step.scale)) == step.scale
    assert grid.qmin <= step.zero_point <= grid.qmax
    # what an exporter does with the recorded range finds the same number
    width = max(abs(step.low), abs(step.high)) if symmetric else step.high - step.low
    assert float(np.float32(width / grid.intervals)) == step.scale


@given(low=FLOATS, high=FLOATS, bits=BITS, symmetric=st.booleans())
def test_the_grid_reaches_both_ends_of_its_range(low: float, high: float, bits: int, symmetric: bool) -> None:
    grid = Grid(bits, symmetric)
    step = grid.step(min(low, high), max(low, high))
    if step is not None:
        slack = 0.51 * step.scale if not symmetric else 1e-6 * step.high
        assert (grid.qmax - step.zero_point) * step.scale >= step.high - slack
        assert (grid.qmin - step.zero_point) * step.scale <= step.low + slack


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_scale_is_invented_for_zeros_or_denormals(symmetric: bool) -> None:
    assert Grid(8, symmetric).step(0.0, 0.0) is None
    assert Grid(8, symmetric).step(-1e-42, 1e-42) is None
    assert Grid(8, symmetric).step(0.0, 1e-30) is not None


def test_the_widest_range_still_has_a_scale() -> None:
    largest = float(np.finfo(np.float32).max)
    for bits in (2, 8, 16):
        assert Grid(bits, False).step(-largest, largest) is not None


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_agree_with_single_steps_and_dead_rows_take_the_tensors_step(symmetric: bool) -> None:
    grid = Grid(8, symmetric)
    low = np.array([-1.0, 0.0, -1e-43, np.inf, 0.5], np.float32)
    high = np.array([2.0, 0.0, 1e-43, -np.inf, 4.0], np.float32)
    whole = grid.step(-1.0, 4.0)
    assert whole is not None
    scales, points = grid.steps(low, high, whole)
    for row in (0, 4):
        own = grid.step(float(low[row]), float(high[row]))
        assert own is not None
        assert (scales[row], points[row]) == (own.scale, own.zero_point)
    assert list(scales[1:4]) == [whole.scale] * 3
    assert list(points[1:4]) == [whole.zero_point] * 3
