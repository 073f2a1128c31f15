# SPDX-License-Identifier: Apache-2.0
"""Sums against Python's exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics import Observation, Range
from calib.statistics.summation import FixedPoint, block_sum, exact_float, exact_integer, pairwise_sum

UNIT = Fraction(1, 2**298)
STEP = Fraction(1, 2**52)

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
partials = st.floats(min_value=0, max_value=2.0**67, allow_nan=False)
"""Non-negative sums of squares below saturation, subnormal ones among them."""


def value(sums: FixedPoint, index: int = 0) -> Fraction:
    """What a fixed-point number stands for."""
    return (int(sums.high.flat[index]) * 2**60 + int(sums.low.flat[index])) * STEP


@given(float32)
def test_a_float32_and_its_square_are_whole_numbers_of_units(x: float) -> None:
    assert exact_integer(x) * UNIT == Fraction(x)
    assert exact_integer(x * x) * UNIT == Fraction(x) ** 2
    assert exact_float(exact_integer(x)) == x


@given(st.lists(float32, max_size=40), st.randoms(use_true_random=False))
def test_exact_sums_are_exact_in_any_order(numbers: list[float], random: object) -> None:
    total = sum(exact_integer(x) for x in numbers)
    assert total * UNIT == sum(map(Fraction, numbers))
    random.shuffle(numbers)  # type: ignore[attr-defined]
    assert sum(exact_integer(x) for x in numbers) == total
    assert exact_float(total) == math.fsum(numbers)


def test_a_sum_beyond_float64_is_infinite_with_its_sign() -> None:
    assert exact_float(1 << 2000) == math.inf
    assert exact_float(-(1 << 2000)) == -math.inf


@given(partials)
def test_a_fixed_point_number_is_its_partial_within_half_a_step(partial: float) -> None:
    sums = FixedPoint.of(np.array([partial]))
    assert abs(value(sums) - Fraction(partial)) <= STEP / 2
    assert 0 <= sums.low[0] < 2**60


@given(st.lists(partials, min_size=1, max_size=30))
@settings(deadline=None)
def test_fixed_point_addition_is_exact(numbers: list[float]) -> None:
    parts = [FixedPoint.of(np.array([x])) for x in numbers]
    total = FixedPoint.zeros((1,))
    for part in parts:
        total = total + part
    exact = sum(value(part) for part in parts)
    assert 0 <= total.low[0] < 2**60
    if exact < 2**69:
        assert value(total) == exact
        assert total.to_float()[0] == pytest.approx(float(exact), rel=2**-51)
    else:
        assert total.to_float()[0] == math.inf


@given(st.lists(st.floats(min_value=0, max_value=2.0**80), min_size=3, max_size=3))
def test_fixed_point_addition_is_commutative_and_associative_also_when_it_saturates(numbers: list[float]) -> None:
    a, b, c = (FixedPoint.of(np.array([x])) for x in numbers)

    def same(left: FixedPoint, right: FixedPoint) -> bool:
        return (left.high[0], left.low[0]) == (right.high[0], right.low[0])

    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))
    assert same(a + FixedPoint.zeros((1,)), a)


@pytest.mark.parametrize("partial", [2.0**68, 2.0**80, math.inf])
def test_what_is_too_large_for_a_fixed_point_number_reads_as_infinite_and_stays_so(partial: float) -> None:
    sums = FixedPoint.of(np.array([partial])) + FixedPoint.of(np.array([1.0]))
    assert sums.to_float()[0] == math.inf


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_neighbours_are_added_first(count: int) -> None:
    # 2^53 swallows a single 1 but not a pair of them, so that the result tells the order
    values = np.array([2.0**53, 0, 1, 1, 1, 1, 1, 1, 1][:count])
    order = {0: 0.0, 1: 2.0**53, 2: 2.0**53, 3: 2.0**53, 7: 2.0**53 + 4, 8: 2.0**53 + 6, 9: 2.0**53 + 8}
    assert pairwise_sum(values) == order[count]


@given(st.integers(0, 300), st.integers(1, 3))
@settings(deadline=None)
def test_a_block_of_whole_numbers_adds_up_exactly(tokens: int, channels: int) -> None:
    values = np.random.default_rng(tokens).integers(-(2**30), 2**30, (tokens, channels)).astype(np.float64)
    assert block_sum(values).tolist() == values.sum(axis=0).tolist()


def test_missing_tokens_count_as_zero() -> None:
    values = np.random.default_rng(0).standard_normal((130, 4))
    padded = np.concatenate([values, np.zeros((126, 4))])
    assert block_sum(values).tolist() == block_sum(padded).tolist()


@given(st.lists(float32, min_size=1, max_size=60), st.integers(1, 5))
@settings(deadline=None)
def test_the_sums_of_a_range_are_within_rounding_of_the_exact_ones(numbers: list[float], blocks: int) -> None:
    values = np.resize(np.array(numbers, np.float32), (blocks, len(numbers), 1))
    measured = Range.observe(values, Observation.of_shape(*values.shape[:2]))
    squares = blocks * sum(Fraction(float(x)) ** 2 for x in values[0, :, 0])
    magnitudes = blocks * sum(abs(Fraction(float(x))) for x in values[0, :, 0])
    total = blocks * sum(Fraction(float(x)) for x in values[0, :, 0])
    # at most 60 additions per block, each rounded to 2^-53
    assert abs(sum(measured.energy) * UNIT - squares) <= squares * 64 * Fraction(1, 2**53)
    assert abs(sum(measured.total) * UNIT - total) <= magnitudes * 64 * Fraction(1, 2**53)
