# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.cures.resample import resampled
from calib.cures.result import CureOptions
from calib.cures.search import find_cure
from calib.errors import UsageError
from calib.measurement import MeasureOptions, measure
from calib.models import OpenedModel, open_model


@pytest.fixture
def opened(tiny_llama: Path) -> OpenedModel:
    return open_model(tiny_llama, device="cpu")


@pytest.fixture
def blocks(opened: OpenedModel) -> TokenBlocks:
    return build_blocks(["builtin:speeches"], opened.tokenizer, samples=12, max_length=32)


def test_samples_follow_what_the_model_expects(opened: OpenedModel, blocks: TokenBlocks) -> None:
    few = blocks.select(range(2))
    with torch.no_grad():
        opened.model.lm_head.weight *= 1e4  # a model that is certain: the sample is its best token
        best = opened.model(input_ids=torch.from_numpy(few.input_ids)).logits[:, :-1].argmax(-1).numpy()
    ids = resampled(opened, few, times=3).blocks.input_ids
    assert ids.shape == (6, 32)
    assert (ids[:, 0] == np.repeat(few.input_ids[:, 0], 3)).all()
    assert (ids[:, 1:] == np.repeat(best, 3, axis=0)).mean() > 0.95  # a few logits tie


def test_the_seed_decides(opened: OpenedModel, blocks: TokenBlocks) -> None:
    first, again, other = (resampled(opened, blocks, seed=seed).blocks for seed in (0, 0, 1))
    assert first.provenance.content_sha256 == again.provenance.content_sha256 != other.provenance.content_sha256
    assert (first.input_ids != blocks.select(np.repeat(range(12), 2)).input_ids).mean() > 0.5


def test_special_tokens_are_not_sampled_and_stay_where_the_text_has_them(
    opened: OpenedModel, blocks: TokenBlocks
) -> None:
    special = opened.tokenizer.all_special_ids
    ids = blocks.input_ids.copy()
    ids[:, 7] = special[0]
    sampled = resampled(opened, blocks.with_ids(ids), times=4).blocks.input_ids
    assert (sampled[:, 7] == special[0]).all()
    assert not np.isin(np.delete(sampled, 7, axis=1), special).any()


def test_refusals(opened: OpenedModel, blocks: TokenBlocks) -> None:
    with pytest.raises(UsageError, match="times 0: not positive"):
        resampled(opened, blocks, times=0)
    with pytest.raises(UsageError, match="predicts no tokens"):
        resampled(replace(opened, model=opened.model.model), blocks)
    with pytest.raises(UsageError, match="must be"):
        blocks.with_ids(blocks.input_ids[:, :-1])


def test_ranges_of_the_chosen_model_cover_the_resampled_text(opened: OpenedModel, blocks: TokenBlocks) -> None:
    few = blocks.select(range(8))
    measurement = measure(opened, few, MeasureOptions(batch_size=4))
    name = "model.layers.1.mlp.down_proj:input"
    before = measurement.sites[name].statistics.range
    cured = find_cure(opened, measurement, few, blocks.select(range(8, 12)), CureOptions(("resample",), target=1.0))
    tried = [row.candidate for row in cured.rows if row.candidate.resampling is not None]
    assert tried
    assert tried[0].ranges.sites[name].statistics.range.count.sum() == 3 * before.count.sum()
    assert tried[0].ranges.sites[name].statistics.range.amax >= before.amax
    if cured.candidate.resampling is not None:  # what is written says so
        assert cured.measurement.corpus.blocks == 24
        assert cured.scales.cures == []  # the model is as it was
        assert cured.scales.model.fingerprint == opened.provenance.fingerprint
