# SPDX-License-Identifier: Apache-2.0
"""Scales follow the published formula within stated bounds; what they do to a tensor is predicted exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.cures import Consumer, Pair, post_smoothing_amax, smoothing_scales
from calib.cures.rules import Rule
from calib.cures.smooth import LARGEST_SCALE
from calib.errors import UsageError


def pair(channels: int, rule: Rule = "norm") -> Pair:
    rows = np.arange(channels)
    return Pair("producer", rows, True, (Consumer("consumer", rows),), rule)


positive = st.floats(1e-2, 1e2)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.floats(0, 1))
@settings(deadline=None)
def test_scales_are_the_published_formula_but_for_a_common_factor(
    values: list[tuple[float, float]], alpha: float
) -> None:
    x, w = np.array(values).T
    scales = smoothing_scales(pair(x.size), x, w, alpha).astype(np.float64)
    published = x**alpha / w ** (1 - alpha)
    np.testing.assert_allclose(scales / scales[0], published / published[0], rtol=1e-5)
    assert np.exp(np.log(scales).mean()) == pytest.approx(1, rel=1e-5)


def test_alpha_one_makes_all_channels_equal() -> None:
    x = np.array([1.0, 8.0, 300.0])
    scales = smoothing_scales(pair(3), x, np.array([0.1, 0.2, 0.3]), 1.0)
    np.testing.assert_allclose(x / scales, np.full(3, post_smoothing_amax(x, np.arange(3), scales)), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_silent_channels_and_columns_stay_within_bounds(alpha: float) -> None:
    x, w = np.array([0.0, 1e-30, 1.0, 1e4]), np.array([1.0, 0.0, 1e-12, 0.5])
    scales = smoothing_scales(pair(4), x, w, alpha)
    assert np.isfinite(scales).all()
    assert (scales >= 1 / LARGEST_SCALE * 0.999).all()
    assert (scales <= LARGEST_SCALE * 1.001).all()


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
def test_a_neuron_that_was_silent_here_cannot_make_the_range_elsewhere(alpha: float) -> None:
    seen = np.array([0.0, 1.0, 2.0, 4.0, 0.0])  # two neurons of a ReLU that this text left at 0
    scales = smoothing_scales(pair(5), seen, np.full(5, 0.1), alpha)
    elsewhere = np.array([2.0, 1.0, 2.0, 4.0, 2.0])  # other text has them fire as their neighbours do
    ranges = [post_smoothing_amax(x, np.arange(5), scales) for x in (seen, elsewhere)]
    assert ranges[1] == pytest.approx(ranges[0])


def test_a_pair_that_was_never_used_is_left_as_it_is() -> None:
    np.testing.assert_allclose(smoothing_scales(pair(3), np.zeros(3), np.zeros(3), 0.7), 1)


def test_many_settings_are_many_rows() -> None:
    x, w = np.array([1.0, 5.0, 9.0]), np.array([0.3, 0.1, 0.2])
    together = smoothing_scales(pair(3), x, w, np.array([[0.2], [0.8]]))
    np.testing.assert_array_equal(together[1], smoothing_scales(pair(3), x, w, 0.8))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_of_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match=r"alpha .*: not in"):
        smoothing_scales(pair(2), np.ones(2), np.ones(2), alpha)


def test_a_norm_of_one_plus_weight_keeps_its_precision_in_bfloat16() -> None:
    """With scales above 1 the stored weight nears -1 and 1 + w loses most of its bits."""
    x, w = np.geomspace(1, 1000, 64), np.full(64, 0.1)
    scales = torch.from_numpy(smoothing_scales(pair(64, "norm_plus_one"), x, w, 0.8))
    assert float(scales.max()) == 1.0
    stored = (1 / scales - 1).bfloat16().float()
    assert float(((1 + stored) * scales - 1).abs().max()) <= 2**-8


def test_largest_value_after_smoothing_is_exact() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, 6)).astype(np.float32) * np.array([1, 9, 0.1, 3, 70, 2], np.float32)
    channels = np.array([0, 0, 1, 1, -1, 2])
    scales = np.array([[2.0, 0.25, 8.0], [1.0, 1.0, 1.0]], np.float32)
    divisor = np.where(channels < 0, 1, scales[0].astype(np.float64)[channels])
    amax = post_smoothing_amax(np.abs(values).max(0), channels, scales)
    assert amax[0] == np.abs(values / divisor).max()
    assert amax[1] == np.abs(values).max()
