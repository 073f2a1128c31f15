# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate

from calib.scales import Grid, expected_error, measured_error
from calib.scales.error import side_errors, sides, square_error
from calib.scales.magnitudes import Magnitudes

KINDS = ("normal", "heavy-tailed", "spiked", "half-normal", "uniform", "relu")
FIGURES = ("sqnr_db", "body_sqnr_db", "peak_sqnr_db", "rel_mae", "clipped", "zeroed")


def linear(error: Any) -> dict[str, float]:
    """Figures as ratios, so that a relative tolerance means the same for all; no SQNR is no noise."""
    return {
        name: value if not name.endswith("_db") else 0.0 if value is None else 10 ** (-value / 10)
        for name in FIGURES
        for value in [getattr(error, name)]
    }


@settings(max_examples=150)
@given(
    values=arrays(np.float32, st.integers(2, 40), elements=st.floats(-(2.0**20), 2.0**20, width=32)),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.7, 0.2, 0.01]),
)
def test_the_error_of_bfloat16_data_is_exact(
    lab: Any, values: np.ndarray, bits: int, symmetric: bool, clip: float
) -> None:
    x = lab.bfloat16(values)
    grid = Grid(bits, symmetric)
    step = grid.step(float(x.min()) * clip, float(x.max()) * clip)
    if step is None:
        return
    arguments = (step.scale, step.zero_point, grid.qmin, grid.qmax)
    expected = linear(expected_error(lab.distribution(x, "bfloat16"), *arguments))
    measured = linear(measured_error(x, *arguments))
    for name in FIGURES:
        # a ratio below 1e-13 is the rounding of float64 sums: the grid holds all values
        assert expected[name] == pytest.approx(measured[name], rel=1e-9, abs=1e-13), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_of_float32_data_is_within_one_percent(lab: Any, kind: str, symmetric: bool) -> None:
    x = lab.values(kind, 1_000_000)
    d = lab.distribution(x)
    for bits in (2, 3, 4, 6, 8, 11, 16):
        grid = Grid(bits, symmetric)
        for clip in (1.0, 0.4, 0.05):
            step = grid.step(d.minimum * clip, d.maximum * clip)
            assert step is not None
            arguments = (step.scale, step.zero_point, grid.qmin, grid.qmax)
            expected = linear(expected_error(d, *arguments))
            measured = linear(measured_error(x, *arguments))
            for name in FIGURES:
                # shares are of a million values: a bin cut in two cannot be right to a few of them.
                # The peak is 1,000 values: whatever their rounding errors happen to be, the expectation is an average.
                few = {"clipped": 2e-5, "zeroed": 2e-5}.get(name, 1e-12)
                rel = 0.1 if name == "peak_sqnr_db" else 0.01
                assert expected[name] == pytest.approx(measured[name], rel=rel, abs=few), (name, bits, clip)


@pytest.mark.parametrize("limit", [0, 1, 3, 127])
@pytest.mark.parametrize(
    ("low", "high"), [(0.1, 0.3), (0.4, 0.6), (0.3, 4.7), (2.9, 3.6), (5.0, 9.0), (126.2, 127.9), (300.0, 301.0)]
)
def test_the_closed_form_is_the_integral(limit: int, low: float, high: float) -> None:
    scale = 0.37
    ends = [np.array([end * scale]) for end in (low, high)]
    side = Magnitudes(ends[0], ends[0], ends[1], np.array([1.0]), False)

    def error(x: float) -> float:
        return x - min(round(x / scale), limit) * scale

    kinks = [scale * k / 2 for k in range(1, 700) if low * scale < scale * k / 2 < high * scale]
    bounds = [low * scale, *kinks, high * scale]
    pieces = list(itertools.pairwise(bounds))
    width = (high - low) * scale
    square = sum(integrate.quad(lambda x: error(x) ** 2, a, b)[0] for a, b in pieces) / width
    absolute = sum(integrate.quad(lambda x: abs(error(x)), a, b)[0] for a, b in pieces) / width
    sums = side_errors(side, scale, limit, body=1)
    assert sums.body == pytest.approx(square, rel=1e-9)
    assert sums.absolute == pytest.approx(absolute, rel=1e-9)
    assert square_error(side, scale, limit) == pytest.approx(square, rel=1e-9)
    below_half = 1.0 if limit == 0 else np.clip((0.5 - low) / (high - low), 0, 1)
    assert sums.zeroed == pytest.approx(below_half)
    assert sums.clipped == pytest.approx(1 - np.clip((limit - low) / (high - low), 0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_absmax_clips_nothing(lab: Any, kind: str, dtype: str) -> None:
    x = lab.values(kind, 20_000) if dtype == "float32" else lab.bfloat16(lab.values(kind, 20_000))
    d = lab.distribution(x, dtype)
    for bits in (2, 8, 16):
        for symmetric in (True, False):
            grid = Grid(bits, symmetric)
            step = grid.step(d.minimum, d.maximum)
            assert step is not None
            arguments = (step.scale, step.zero_point, grid.qmin, grid.qmax)
            assert expected_error(d, *arguments).clipped == 0
            assert measured_error(x, *arguments).clipped == 0


def test_the_search_objective_is_the_squared_error(lab: Any) -> None:
    for dtype in ("float32", "bfloat16"):
        d = lab.distribution(lab.values("heavy-tailed"), dtype)
        for zero_point in (0, 13, -128):
            for side, limit in sides(d, zero_point, -128, 127):
                full = side_errors(side, 0.1, limit, body=0)
                assert square_error(side, 0.1, limit) == pytest.approx(full.peak, rel=1e-9)


def test_a_grid_that_holds_every_value_has_no_error_and_no_sqnr(lab: Any) -> None:
    x = np.arange(-127, 128, dtype=np.float32)
    error = expected_error(lab.distribution(x, "bfloat16"), 1.0)
    assert (error.sqnr_db, error.body_sqnr_db, error.rel_mae, error.zeroed, error.clipped) == (None, None, 0, 0, 0)
    assert error == measured_error(x, 1.0)


def test_zeros_have_no_error(lab: Any) -> None:
    error = expected_error(lab.distribution(np.zeros(100, np.float32)), 1.0)
    assert (error.sqnr_db, error.rel_mae, error.zeroed) == (None, 0, 0)


def test_ties_round_to_even(lab: Any) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    error = expected_error(lab.distribution(x, "bfloat16"), 1.0)
    assert error.zeroed == 2 / 5
    assert error.rel_mae == pytest.approx(2.5 / 6.5)


def test_a_zero_point_at_the_end_loses_one_side(lab: Any) -> None:
    x = lab.bfloat16(lab.values("normal", 10_000))
    error = expected_error(lab.distribution(x, "bfloat16"), 0.02, 127, -128, 127)
    measured = measured_error(x, 0.02, 127, -128, 127)
    for name, value in linear(error).items():
        assert value == pytest.approx(linear(measured)[name], rel=1e-9), name
    assert error.zeroed is not None
    assert error.zeroed > 0.5


def test_sqnr_alone_hides_a_destroyed_body(lab: Any) -> None:
    """The finding that the error table exists for: 10 dB and more while everything but the peaks is 0."""
    d = lab.distribution(lab.values("spiked"))
    step = Grid(8).step(d.minimum, d.maximum)
    assert step is not None
    error = expected_error(d, step.scale)
    assert error.sqnr_db is not None
    assert error.sqnr_db > 10
    assert error.body_sqnr_db == pytest.approx(0, abs=0.1)
    assert error.zeroed is not None
    assert error.zeroed > 0.99
