# SPDX-License-Identifier: Apache-2.0
"""Single statistics against their definitions on values chosen by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calib.statistics import (
    REST,
    SINK,
    ChannelStatistics,
    DocumentMaxima,
    FloatHistogram,
    Observation,
    PeakList,
    Range,
    SiteStatistics,
    WeightStatistics,
)
from calib.statistics.fault import Fault
from calib.statistics.observation import EXCLUDED


def batch() -> tuple[np.ndarray, Observation]:
    """Two rows of three tokens of two channels; the second row is padded on the left and holds an infinity."""
    values = np.array(
        [[[9.0, -1.0], [2.0, 3.0], [-4.0, 0.5]], [[777.0, 777.0], [8.0, np.inf], [1.0, -6.0]]], np.float32
    )
    valid = np.array([[True, True, True], [False, True, True]])
    ids = np.array([[10, 11, 12], [20, 21, 22]])
    context = Observation.of_tokens(
        ids, document=np.array([5, 3]), domain=np.array([0, 1], np.int16), valid=valid, sink_positions=1
    )
    return values, context


def test_sink_positions_are_counted_from_the_first_valid_token() -> None:
    _, context = batch()
    assert context.group.tolist() == [[SINK, REST, REST], [EXCLUDED, SINK, REST]]


def test_a_range_keeps_groups_apart_and_ignores_padding() -> None:
    measured = Range.observe(*batch())
    assert (measured.min, measured.max, measured.amax) == (-6.0, 9.0, 9.0)
    assert (measured.of(SINK).min, measured.of(SINK).max) == (-1.0, 9.0)
    assert (measured.of(REST).amax, measured.of(REST).count_all) == (6.0, 6)
    assert (measured.count_all, measured.nonfinite_all) == (9, 1)
    assert measured.sum == 12.5
    assert measured.mean == 12.5 / 9
    assert measured.sum_of_squares == 81 + 1 + 4 + 9 + 16 + 0.25 + 64 + 1 + 36
    assert measured.rms == math.sqrt(measured.sum_of_squares / 9)


def test_an_empty_range_has_no_mean_and_no_amax() -> None:
    empty = Range.empty()
    assert math.isnan(empty.mean)
    assert math.isnan(empty.rms)
    assert empty.amax == 0.0


def test_channels_have_extremes_and_energies_of_their_own() -> None:
    measured = ChannelStatistics.observe(*batch())
    assert measured.amax.tolist() == [9.0, 6.0]
    assert measured.minimum.tolist() == [[-4.0, -6.0], [8.0, -1.0]]
    assert measured.sum_of_squares.tolist() == [[4 + 16 + 1, 9 + 0.25 + 36], [81 + 64, 1]]


def test_a_channel_that_saw_nothing_has_amax_zero() -> None:
    assert ChannelStatistics.empty(3).amax.tolist() == [0.0, 0.0, 0.0]


def test_different_numbers_of_channels_do_not_merge() -> None:
    with pytest.raises(ValueError, match="2 channels do not merge with 3"):
        ChannelStatistics.empty(2).merge(ChannelStatistics.empty(3))


def test_document_maxima_name_document_domain_and_group() -> None:
    measured = DocumentMaxima.observe(*batch())
    assert measured.document.tolist() == [3, 5]
    assert measured.domain.tolist() == [1, 0]
    assert measured.amax.tolist() == [[6.0, 8.0], [4.0, 9.0]]


def test_a_document_in_two_batches_is_one_row_and_an_unseen_group_is_nan() -> None:
    ids = np.zeros((1, 1), np.int64)
    parts = [
        DocumentMaxima.observe(
            np.full((1, 1, 1), value, np.float32), Observation.of_tokens(ids, document=np.array([4]))
        )
        for value in (2.0, -3.0)
    ]
    whole = parts[0].merge(parts[1])
    assert whole.document.tolist() == [4]
    assert whole.amax[0, SINK] == 3.0
    assert math.isnan(whole.amax[0, REST])


def test_peaks_carry_sign_place_and_token() -> None:
    peaks = PeakList.observe(*batch(), limit=3)
    found = zip(
        peaks.value.tolist(),
        peaks.document.tolist(),
        peaks.position.tolist(),
        peaks.channel.tolist(),
        peaks.token_id.tolist(),
        strict=True,
    )
    assert list(found) == [(9.0, 5, 0, 0, 10), (8.0, 3, 1, 0, 21), (-6.0, 3, 2, 1, 22)]


def test_zeros_are_no_peaks_and_the_shorter_limit_wins() -> None:
    values = np.array([[[0.0, 1.0, -2.0]]], np.float32)
    peaks = PeakList.observe(values, Observation.of_shape(1, 1))
    assert peaks.value.tolist() == [-2.0, 1.0]
    assert len(peaks.merge(PeakList.empty(limit=1))) == 1


def test_a_fault_is_the_first_by_document_then_position_then_channel() -> None:
    values, context = batch()
    assert Fault.observe(values, context).place == (3, 1, 1)
    values[0, 2, 0] = np.nan
    assert Fault.observe(values, context).place == (3, 1, 1)
    assert Fault((7, 0, 0)).merge(Fault((3, 9, 9))).place == (3, 9, 9)
    assert Fault().merge(Fault((3, 9, 9))).place == (3, 9, 9)


def test_what_one_side_lacks_is_dropped_in_a_merge() -> None:
    full = SiteStatistics.observe(*batch())
    ranges = SiteStatistics(full.range, full.documents, fault=full.fault)
    for merged in (full.merge(ranges), ranges.merge(full)):
        assert merged.range.count_all == 2 * full.range.count_all
        assert [merged.histogram, merged.channels, merged.peaks, merged.tokens] == [None] * 4


def test_an_empty_peak_list_is_kept_in_a_merge() -> None:
    zeros = SiteStatistics.observe(np.zeros((1, 1, 1), np.float32), Observation.of_shape(1, 1))
    assert zeros.peaks is not None
    assert len(zeros.peaks) == 0
    assert zeros.merge(zeros).peaks is not None


def test_ranges_alone_survive_a_file() -> None:
    full = SiteStatistics.observe(*batch())
    tensors = SiteStatistics(full.range, full.documents, fault=full.fault).to_tensors()
    read = SiteStatistics.from_tensors(tensors)
    assert read.histogram is None
    assert read.fault.place == full.fault.place
    assert {k: v.tobytes() for k, v in read.to_tensors().items()} == {k: v.tobytes() for k, v in tensors.items()}


def test_weights_survive_a_file() -> None:
    matrix = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    flat = matrix.reshape(1, 1, -1)
    context = Observation.of_shape(1, 1)
    held = WeightStatistics(
        matrix.min(1),
        matrix.max(1),
        np.abs(matrix).max(0),
        Range.observe(flat, context),
        FloatHistogram.observe(flat, context),
        (4, 3, 2),
    )
    read = WeightStatistics.from_tensors(held.to_tensors())
    assert read.shape == (4, 3, 2)
    assert read.column_amax.tolist() == held.column_amax.tolist()
    assert {k: v.tobytes() for k, v in read.to_tensors().items()} == {
        k: v.tobytes() for k, v in held.to_tensors().items()
    }
