# SPDX-License-Identifier: Apache-2.0
"""The monoid laws of a site's statistics, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics import Observation, SiteStatistics
from calib.statistics.histogram import BINS, FloatHistogram, bfloat16_bins, bin_edges, bin_values
from calib.statistics.range import Range
from calib.statistics.site import _FIELDS

SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 7.0, -7.0, 1e-40, 3e38], np.float32)


def batch(seed: int, blocks: int = 3, tokens: int = 7, channels: int = 5) -> tuple[np.ndarray, Observation]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((blocks, tokens, channels)).astype(np.float32)
    special = rng.random(values.shape) < 0.2
    values[special] = rng.choice(SPECIAL, int(special.sum()))
    valid = rng.random((blocks, tokens)) < 0.8
    document = rng.integers(0, 4, blocks)
    # one domain per document
    context = Observation.of_tokens(
        rng.integers(0, 99, (blocks, tokens)), document=document, domain=(document % 2).astype(np.int16), valid=valid
    )
    return values, context


def part(values: np.ndarray, context: Observation, rows: slice) -> SiteStatistics:
    cut = Observation(context.group[rows], context.document[rows], context.domain[rows], context.token_id[rows])
    return SiteStatistics.observe(values[rows], cut)


def assert_equal(first: SiteStatistics, second: SiteStatistics) -> None:
    left, right = first.to_tensors(), second.to_tensors()
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("field", sorted(set(_FIELDS) - {"ratios"}))  # on request only: see test_ratios.py
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_merge_is_commutative_associative_and_has_a_neutral_element(field: str, seed: int) -> None:
    a, b, c = (getattr(SiteStatistics.observe(*batch(seed + i)), field) for i in range(3))
    kind = type(a)
    neutral = kind.empty(5) if field == "channels" else kind() if field == "fault" else kind.empty()

    def same(x: object, y: object) -> bool:
        left, right = x.to_tensors(), y.to_tensors()  # type: ignore[attr-defined]
        return all(left[k].tobytes() == right[k].tobytes() for k in left)

    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(neutral), a)
    assert same(neutral.merge(a), a)


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_split_batches_merge_to_the_whole(seed: int, cut: int) -> None:
    values, context = batch(seed, blocks=6)
    halves = part(values, context, slice(cut)).merge(part(values, context, slice(cut, None)))
    assert_equal(halves, SiteStatistics.observe(values, context))


def test_tensors_carry_all_statistics() -> None:
    statistics = SiteStatistics.observe(*batch(1))
    assert_equal(SiteStatistics.from_tensors(statistics.to_tensors()), statistics)


def test_every_bfloat16_number_is_its_own_bin_and_within_its_edges() -> None:
    bins = np.arange(BINS, dtype=np.uint16)
    bins = bins[((bins & 0x7FFF) <= 0x7F7F) & (bins != 0x8000)]
    values = bin_values(bins)
    assert (bfloat16_bins(values.astype(np.float32)) == bins).all()
    low, high = bin_edges(bins)
    assert ((low <= values) & (values <= high)).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_edges_contain_every_float32(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    bins = bfloat16_bins(values)
    low, high = bin_edges(bins)
    assert ((low <= values) & (values <= high)).all()
    normal = (np.abs(values) >= 2.0**-126) & (np.abs(values) < 2.0**127)
    error = np.abs(bin_values(bins) - values.astype(np.float64))
    assert (error[normal] <= 2.0**-8 * np.abs(values[normal].astype(np.float64))).all()


def test_counts_of_the_histogram_are_all_finite_valid_values() -> None:
    values, context = batch(3)
    kept = values[context.group != 255]
    assert FloatHistogram.observe(values, context).count() == np.isfinite(kept).sum()


def test_sums_of_one_block_of_exact_values_are_exact() -> None:
    values = np.random.default_rng(0).integers(-999, 999, (1, 300, 6)).astype(np.float32)
    measured = Range.observe(values, Observation.of_shape(1, 300))
    assert measured.sum == math.fsum(values.ravel().tolist())
    assert measured.sum_of_squares == math.fsum(float(v) ** 2 for v in values.ravel())


def test_peaks_of_equal_size_and_place_are_ordered_by_sign() -> None:
    # two blocks of one document may hold the same token at the same position
    context = Observation.of_tokens(np.zeros((1, 1), np.int64), document=np.zeros(1, np.int64))
    plus, minus = (SiteStatistics.observe(np.full((1, 1, 1), v, np.float32), context) for v in (7.0, -7.0))
    assert_equal(plus.merge(minus), minus.merge(plus))
