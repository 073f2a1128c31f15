# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.cures.judge import Score
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
    ids = resampled(opened, few, times=3).input_ids
    assert ids.shape == (6, 32)
    assert (ids[:, 0] == np.repeat(few.input_ids[:, 0], 3)).all()
    assert (ids[:, 1:] == np.repeat(best, 3, axis=0)).mean() > 0.95  # a few logits tie


def test_the_seed_decides(opened: OpenedModel, blocks: TokenBlocks) -> None:
    first, again, other = (resampled(opened, blocks, seed=seed) for seed in (0, 0, 1))
    assert first.provenance.content_sha256 == again.provenance.content_sha256 != other.provenance.content_sha256
    assert (first.input_ids != blocks.select(np.repeat(range(12), 2)).input_ids).mean() > 0.5


def test_special_tokens_are_not_sampled_and_stay_where_the_text_has_them(
    opened: OpenedModel, blocks: TokenBlocks
) -> None:
    special = opened.tokenizer.all_special_ids
    ids = blocks.input_ids.copy()
    ids[:, 7] = special[0]
    sampled = resampled(opened, blocks.rewritten(ids, "with special tokens"), times=4).input_ids
    assert (sampled[:, 7] == special[0]).all()
    assert not np.isin(np.delete(sampled, 7, axis=1), special).any()


def test_refusals(opened: OpenedModel, blocks: TokenBlocks) -> None:
    with pytest.raises(UsageError, match="times 0: not positive"):
        resampled(opened, blocks, times=0)
    with pytest.raises(UsageError, match="predicts no tokens"):
        resampled(replace(opened, model=opened.model.model), blocks)
    with pytest.raises(UsageError, match="must be"):
        blocks.rewritten(blocks.input_ids[:, :-1], "short")


def test_blocks_are_joined_with_their_sources(opened: OpenedModel, blocks: TokenBlocks) -> None:
    both = blocks.joined(resampled(opened, blocks, times=1, seed=5))
    assert [source.name for source in both.provenance.sources] == ["builtin", "resampled, seed 5"]
    assert both.provenance.blocks_per_domain == {"speeches": 12, "resampled, seed 5": 12}
    assert both.provenance.documents == 2 * blocks.provenance.documents
    assert (both.input_ids[:12] == blocks.input_ids).all()
    assert both.select(range(12)).input_ids.tolist() == blocks.input_ids.tolist()


def loud_at(opened: OpenedModel, token: int) -> None:
    """A neuron that fires for one word, far louder than for any other."""
    direction = torch.nn.functional.normalize(opened.model.get_input_embeddings().weight[token].detach(), dim=0)
    mlp = opened.model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 0.15 * direction
        mlp.down_proj.weight[:, 0] *= 20


def test_ranges_cover_words_that_the_text_lacks_and_the_scale_file_says_so(
    opened: OpenedModel, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # likelihoods under a random model are chance
    monkeypatch.setattr(Score, "ratio", lambda self, reference: None)
    few = blocks.select([0] * 8)
    with torch.no_grad():
        opened.model.model.norm.weight *= 15  # a random model is sure of nothing, and nothing changes its mind
    counts = np.bincount(resampled(opened, few).input_ids.ravel(), minlength=300)
    counts[few.input_ids] = 0
    word = int(counts.argmax())  # the model expects it in the text, which does not have it
    loud_at(opened, word)
    held_out = resampled(opened, blocks.select(range(8, 12)), seed=7)
    held_out.input_ids[:, ::8] = word
    measurement = measure(opened, few, MeasureOptions(batch_size=4))
    name = "model.layers.0.mlp.down_proj:input"
    before = measurement.sites[name].statistics.range
    options = CureOptions(("resample",), target=1.0)
    cured = find_cure(opened, measurement, few, held_out, options)
    assert cured.rows[-1].divergence.value < 0.1 * cured.rows[0].divergence.value
    assert cured.candidate.resampled is not None
    after = cured.candidate.measurement.sites[name].statistics.range
    assert after.count.sum() == 3 * before.count.sum()
    assert after.amax > 5 * before.amax
    assert cured.scales.corpus.blocks_per_domain == {"speeches": 8, "resampled, seed 0": 16}
    assert cured.scales.cures == []  # the model is as it was
