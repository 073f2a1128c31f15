# SPDX-License-Identifier: Apache-2.0
"""Paired bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from calib.errors import UsageError
from calib.evaluation.interval import mean_interval, perplexity_ratio


def test_an_interval_is_deterministic_and_follows_its_seed() -> None:
    values = np.random.default_rng(1).normal(size=(12, 30))
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values)


def test_the_value_is_the_mean_and_lies_inside() -> None:
    values = np.random.default_rng(2).normal(3.0, 1.0, size=(12, 30))
    found = mean_interval(values)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low < found.value < found.high


def test_an_interval_has_the_width_that_theory_gives_to_a_mean() -> None:
    values = np.random.default_rng(3).normal(size=400)
    found = mean_interval(values, share=0.9)
    width = 2 * 1.645 * values.std() / np.sqrt(len(values))
    assert found.high - found.low == pytest.approx(width, rel=0.05)
    assert mean_interval(values, share=0.5).high - mean_interval(values, share=0.5).low < found.high - found.low


def test_tokens_of_a_block_are_drawn_together() -> None:
    blocks = np.random.default_rng(4).normal(size=(20, 1))
    repeated = np.repeat(blocks, 500, axis=1)  # 500 tokens that say the same are no more evidence than one
    assert mean_interval(repeated).low == pytest.approx(mean_interval(blocks).low, rel=1e-9)


def test_a_ratio_is_paired() -> None:
    rng = np.random.default_rng(5)
    reference = rng.normal(4.0, 1.0, size=(12, 1)) + rng.normal(0.0, 0.5, size=(12, 63))
    found = perplexity_ratio(reference + np.log(1.02), reference)
    # blocks differ by far more than the models: only a paired difference is this sure
    assert (found.low, found.value, found.high) == pytest.approx((1.02, 1.02, 1.02), rel=1e-9)
    whole = np.exp(reference.mean() + np.log(1.02)) / np.exp(reference.mean())
    assert found.value == pytest.approx(whole, rel=1e-9)


def test_scores_of_other_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="same blocks"):
        perplexity_ratio(np.zeros((3, 4)), np.zeros((4, 4)))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        mean_interval(np.ones(3), share=share)


def test_no_block_is_refused() -> None:
    with pytest.raises(UsageError, match="0 blocks"):
        mean_interval(np.empty((0, 5)))
