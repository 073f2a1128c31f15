# SPDX-License-Identifier: Apache-2.0
"""The test of massive tokens, against its definition token by token, and the laws of its statistic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics import Observation, TokenRatio

SPECIAL = np.array([0.0, np.nan, np.inf, -np.inf, 150.0, -90000.0, 1e-40, 3e38], np.float32)


def batch(seed: int, blocks: int = 3, tokens: int = 7, channels: int = 6) -> tuple[np.ndarray, Observation]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((blocks, tokens, channels)).astype(np.float32)
    special = rng.random(values.shape) < 0.1
    values[special] = rng.choice(SPECIAL, int(special.sum()))
    values[0, 0] = 0
    context = Observation.of_tokens(np.zeros((blocks, tokens), np.int64), valid=rng.random((blocks, tokens)) < 0.8)
    return values, context


def cut(values: np.ndarray, context: Observation, rows: slice | list[int]) -> TokenRatio:
    part = Observation(context.group[rows], context.document[rows], context.domain[rows], context.token_id[rows])
    return TokenRatio.observe(values[rows], part)


def same(left: TokenRatio, right: TokenRatio) -> bool:
    return all(
        a.tobytes() == b.tobytes() for a, b in zip(*(x.to_tensors().values() for x in (left, right)), strict=True)
    )


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_every_token_is_tested_by_the_definition(seed: int) -> None:
    values, context = batch(seed)
    found = TokenRatio.observe(values, context)
    tokens = torch.from_numpy(values[context.group != 255]).abs()
    tokens = tokens[tokens.isfinite().all(1)].double()
    largest, median = tokens.amax(1), tokens.median(1).values
    ratio = largest / median
    assert found.tokens.sum() == len(tokens)
    assert found.passed.sum() == int(((largest > 100) & (ratio > 1000)).sum())
    assert found.medianless == int((median == 0).sum())
    known = ratio[median > 0].numpy()
    assert found.mean == pytest.approx(known.mean() if known.size else 0)
    assert found.std == pytest.approx(known.std() if known.size else 0, rel=1e-6, abs=1e-6 * found.mean)
    assert found.peak[0] == (largest.max().item() if len(tokens) else 0)
    if known.size:
        assert found.steepest[0] / found.steepest[1] == known.max()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_merging_is_exact_in_any_order_and_has_a_neutral_element(seed: int) -> None:
    values, context = batch(seed)
    whole = TokenRatio.observe(values, context)
    a, b, c = (cut(values, context, slice(i, i + 1)) for i in range(3))
    assert same(whole, a.merge(b).merge(c))
    assert same(whole, c.merge(a.merge(b)))
    assert same(whole, cut(values, context, [2, 0, 1]))
    assert same(whole, whole.merge(TokenRatio.empty()))
    assert same(whole, TokenRatio.from_tensors(whole.to_tensors()))


def test_both_thresholds_are_exclusive_and_groups_are_kept_apart() -> None:
    row = np.full((1, 8, 4), 0.0625, np.float32)
    row[0, :, 0] = [100, 100.5, 62.5, 63, 1000, 1, 2, 101]
    row[0, 4, 1:] = 1.0  # ratio 1,000 exactly
    context = Observation.of_tokens(np.zeros((1, 8), np.int64), sink_positions=2)
    found = TokenRatio.observe(row, context)
    assert found.tokens.tolist() == [6, 2]
    assert found.passed.tolist() == [1, 1]  # 101 in the rest; 100.5 among the sinks, but not 100 itself
    assert found.peak == (1000.0, 1.0)


def test_padding_and_non_finite_tokens_are_left_out() -> None:
    values = np.full((1, 3, 4), 0.01, np.float32)
    values[0, :, 0] = 5000
    values[0, 1, 2] = np.nan
    context = Observation.of_tokens(np.zeros((1, 3), np.int64), valid=np.array([[True, True, False]]))
    found = TokenRatio.observe(values, context)
    assert (found.tokens.sum(), found.passed.sum()) == (1, 1)
