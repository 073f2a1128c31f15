# SPDX-License-Identifier: Apache-2.0
"""Quantiles of the histogram are those of the values that it counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics import REST, SINK, FloatHistogram, Observation
from calib.statistics.histogram import BINS, bfloat16_bins, bin_values
from calib.statistics.tokens import token_maxima

SHARES = (0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


def histogram(values: np.ndarray, sinks: int = 0) -> FloatHistogram:
    """Of a flat array, its first values at sink positions."""
    ids = np.zeros((1, values.size), np.int64)
    return FloatHistogram.observe(values.reshape(1, -1, 1), Observation.of_tokens(ids, sink_positions=sinks))


def rounded(values: np.ndarray) -> np.ndarray:
    return bin_values(bfloat16_bins(values))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_quantiles_are_those_of_numpy_on_the_rounded_values(numbers: list[float], share: float) -> None:
    values = np.array(numbers, np.float32)
    expected = np.quantile(np.abs(rounded(values)), share, method="inverted_cdf")
    assert histogram(values).quantile_abs(share) == expected


@pytest.mark.parametrize("size", [1, 9, 1000, 99_999, 1_000_000])
def test_shares_that_are_whole_ranks_are_not_rounded_up(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    magnitudes = np.sort(np.abs(rounded(values)))
    found = histogram(values).quantiles_abs(SHARES)
    ranks = [max(1, -(-round(share * 10_000) * size // 10_000)) for share in SHARES]
    assert found == [magnitudes[rank - 1] for rank in ranks]


def test_float32_quantiles_are_within_the_error_of_a_bin() -> None:
    values = np.random.default_rng(1).standard_t(3, 50_000).astype(np.float32)
    exact = np.quantile(np.abs(values), SHARES, method="inverted_cdf")
    np.testing.assert_allclose(histogram(values).quantiles_abs(SHARES), exact, rtol=2.0**-8)


def test_groups_have_quantiles_of_their_own() -> None:
    values = np.array([100.0, 200.0, 1.0, 2.0, 3.0], np.float32)
    held = histogram(values, sinks=2)
    assert held.quantile_abs(1.0, SINK) == 200.0
    assert held.quantile_abs(1.0, REST) == 3.0
    assert held.quantile_abs(0.6) == 3.0
    assert (held.count(SINK), held.count(REST), held.count()) == (2, 3, 5)


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        histogram(np.ones(3, np.float32)).quantile_abs(share)


def test_an_empty_histogram_has_no_quantiles() -> None:
    with pytest.raises(ValueError, match="no quantiles"):
        FloatHistogram.empty().quantile_abs(0.5)


def test_the_combined_distribution_ascends_and_counts_each_group_once() -> None:
    values = np.array([-2.0, 3.0, -2.0, 0.0, 5.0, -0.0], np.float32)
    numbers, counts, low, high = histogram(values, sinks=3).combined()
    assert numbers.tolist() == [-2.0, 0.0, 3.0, 5.0]
    assert counts.tolist() == [2, 2, 1, 1]
    assert (low <= numbers).all()
    assert (numbers <= high).all()


def test_dense_counts_of_any_integer_type_are_kept() -> None:
    dense = np.zeros((2, BINS), np.uint32)
    dense[REST, 0x3F80], dense[SINK, 0xC000] = 7, 4_000_000_000
    held = FloatHistogram.from_dense(dense)
    assert [b.tolist() for b in held.bins] == [[0x3F80], [0xC000]]
    assert held.count() == 4_000_000_007
    assert held.merge(held).count() == 8_000_000_014


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_token_maxima_are_the_largest_finite_magnitude_of_each_token(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 5, 3)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    valid = rng.random((2, 5)) < 0.7
    context = Observation.of_tokens(np.zeros((2, 5), np.int64), valid=valid, sink_positions=0)
    numbers, counts, _, _ = token_maxima(values, context).combined()
    expected = [max((abs(float(x)) for x in row if np.isfinite(x)), default=0.0) for row in values[valid]]
    assert np.repeat(numbers, counts).tolist() == sorted(rounded(np.array(expected, np.float32)).tolist())
