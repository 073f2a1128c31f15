# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calib.scales import Distribution
from calib.statistics import REST, SINK

VALUES = arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(values=VALUES)
def test_bfloat16_values_and_their_sums_are_exact(lab: Any, values: np.ndarray) -> None:
    x = lab.bfloat16(values).astype(np.float64)
    d = lab.distribution(x, "bfloat16")
    assert (d.minimum, d.maximum, d.count, d.zeros) == (x.min(), x.max(), x.size, np.count_nonzero(x == 0))
    np.testing.assert_allclose(d.folded.squares_below[-1], np.square(x).sum(), rtol=1e-12)
    np.testing.assert_allclose(d.positive.sums_below[-1], x[x > 0].sum(), rtol=1e-12)
    np.testing.assert_allclose(d.negative.sums_below[-1], -x[x < 0].sum(), rtol=1e-12)


@given(values=VALUES, dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_counts_are_kept_and_entries_ascend_within_the_range(lab: Any, values: np.ndarray, dtype: str) -> None:
    x = lab.bfloat16(values) if dtype == "bfloat16" else values
    d = lab.distribution(x, dtype)
    for side, amax in ((d.folded, d.amax), (d.positive, d.maximum), (d.negative, -d.minimum)):
        assert np.all(np.diff(side.low) >= 0)
        assert np.all(np.diff(side.high) >= 0)
        assert np.all(side.low <= side.high)
        if side.value.size:
            assert side.top <= max(amax, 0.0) * (1 + 1e-12)
    assert d.folded.total == d.count - d.zeros == d.positive.total + d.negative.total


def test_intervals_end_at_the_observed_extremes(lab: Any) -> None:
    x = lab.values("heavy-tailed")
    d = lab.distribution(x)
    assert d.positive.top == x.max()
    assert d.negative.top == -x.min()
    assert d.folded.top == np.abs(x).max()
    only = lab.distribution(x[x > 1])
    assert only.positive.low[0] == x[x > 1].min()


def test_the_largest_value_counts_as_itself(lab: Any) -> None:
    x = np.append(lab.values("normal", 1000), np.float32(1009.3))
    d = lab.distribution(x)
    np.testing.assert_allclose(d.folded.squares_below[-1], np.square(x.astype(np.float64)).sum(), rtol=2e-5)


def test_a_constant_is_exact_in_any_dtype(lab: Any) -> None:
    for value in (0.1234567, -7.654321):
        d = lab.distribution(np.full(10, value, np.float32))
        assert d.exact
        side = d.positive if value > 0 else d.negative
        assert (side.low[0], side.high[0], side.count[0]) == (abs(np.float32(value)), abs(np.float32(value)), 10)
        assert d.body_size(side) == 1


def test_an_empty_tensor_has_an_empty_distribution(lab: Any) -> None:
    d = lab.distribution(np.zeros(0, np.float32))
    assert (d.count, d.amax, d.folded.total, d.body_limit) == (0, 0.0, 0.0, 0.0)


def test_groups_add_up_and_share_the_body_of_the_whole(lab: Any) -> None:
    x = lab.values("spiked", 40 * 8 * 32).reshape(8, 40, 32)
    s = lab.statistics(x, sinks=4)
    whole = Distribution.of(s.histogram, s.range, "float32")
    rest, sink = (Distribution.of(s.histogram, s.range, "float32", group=g, whole=whole) for g in (REST, SINK))
    assert rest.count + sink.count == whole.count
    assert sink.count == 8 * 4 * 32
    assert rest.energy + sink.energy == pytest.approx(whole.energy, rel=1e-12)
    assert rest.body_limit == sink.body_limit == whole.body_limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_body_ends_at_the_quantile_of_the_histogram(lab: Any, dtype: str) -> None:
    for kind in lab.kinds:
        x = lab.bfloat16(lab.values(kind)) if dtype == "bfloat16" else lab.values(kind)
        histogram, extent = lab.flat(x)
        assert Distribution.of(histogram, extent, dtype).body_limit == histogram.quantile_abs(0.999)


@given(values=VALUES, share=st.sampled_from([0.0, 1e-4, 0.01, 0.25, 0.5]))
def test_clipping_a_share_leaves_at_most_that_share_outside(lab: Any, values: np.ndarray, share: float) -> None:
    x = lab.bfloat16(values)
    d = lab.distribution(x, "bfloat16")
    assert np.count_nonzero(np.abs(x) > d.clipped_abs(share)) <= share * x.size or d.clipped_abs(share) == 0
    low, high = d.clipped_range(share)
    assert np.count_nonzero((x < low) | (x > high)) <= share * x.size
    if share == 0:
        assert (low, high) == (x.min(), x.max())


def test_ranks_inside_a_bin_are_interpolated(lab: Any) -> None:
    x = np.sort(np.abs(lab.values("normal")))
    d = lab.distribution(x)
    for share in (0.5, 0.01, 0.001):
        exact = x[x.size - int(share * x.size) - 1]
        assert d.clipped_abs(share) == pytest.approx(exact, rel=1.5e-3)


@given(values=VALUES, limit=st.floats(0, 2.0**100))
def test_counting_below_a_limit_is_exact_for_points(lab: Any, values: np.ndarray, limit: float) -> None:
    x = np.abs(lab.bfloat16(values))
    side = lab.distribution(x, "bfloat16").folded
    assert side.count_below(limit) == np.count_nonzero((x > 0) & (x <= limit))
