# SPDX-License-Identifier: Apache-2.0
"""Scores of language models, against what transformers and scipy say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import nn

from calib.errors import GateError, UsageError
from calib.evaluation.language import compare_many, compare_tokens, score_tokens
from calib.models import open_model
from calib.quantized import QuantizedModel, plan_from_scales


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> nn.Module:
    return open_model(tiny_llama, device="cpu", dtype="float32").model


@pytest.fixture(scope="module")
def blocks() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(4, 300, (5, 24))


def logits_of(model: nn.Module, ids: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.asarray(ids))).logits.double().numpy()


class Fixed(nn.Module):
    """Gives the logits that it was made with, ``[tokens, vocabulary]``."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.logits.detach().expand(len(input_ids), -1, -1))


@contextmanager
def logits(model: Fixed, other: torch.Tensor) -> Iterator[None]:
    own = model.logits
    model.logits = nn.Parameter(other)
    try:
        yield
    finally:
        model.logits = own


def test_the_mean_nll_of_a_block_is_the_loss_of_transformers(llama: nn.Module, blocks: Any) -> None:
    found = score_tokens(llama, blocks, batch_size=2)
    assert found.nll.shape == (5, 23)
    for row, nll in zip(blocks, found.nll, strict=True):
        ids = torch.from_numpy(row[None])
        with torch.no_grad():
            assert nll.mean() == pytest.approx(llama(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(found.nll.mean()))


def test_batches_do_not_change_scores(llama: nn.Module, blocks: Any) -> None:
    np.testing.assert_allclose(
        score_tokens(llama, blocks, batch_size=1).nll, score_tokens(llama, blocks, batch_size=5).nll, rtol=1e-5
    )


def test_kl_and_agreement_are_those_of_scipy(llama: nn.Module, blocks: Any) -> None:
    plan = plan_from_scales(llama, inputs="dynamic-per-token", bits=3)
    reference, found = compare_tokens(llama, blocks, lambda: QuantizedModel(llama, plan), batch_size=2)
    plain = logits_of(llama, blocks)[:, :-1]
    with QuantizedModel(llama, plan):
        rounded = logits_of(llama, blocks)[:, :-1]
    assert found.kl is not None
    assert found.top1 is not None
    kl = entropy(softmax(plain, -1), softmax(rounded, -1), axis=-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-6)
    assert found.kl.max() > 1e-3  # 3 bits do change something
    np.testing.assert_array_equal(found.top1, plain.argmax(-1) == rounded.argmax(-1))
    assert 0 < found.top1.mean() < 1
    picked = -np.take_along_axis(log_softmax(rounded, -1), blocks[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found.nll, picked, rtol=1e-5)
    np.testing.assert_allclose(reference.nll, score_tokens(llama, blocks).nll, rtol=1e-5)


def test_an_unchanged_model_has_no_divergence(llama: nn.Module, blocks: Any) -> None:
    reference, found = compare_tokens(llama, blocks, nullcontext)
    assert found.kl is not None
    assert found.top1 is not None
    np.testing.assert_array_equal(found.kl, 0)
    assert found.top1.all()
    np.testing.assert_array_equal(found.nll, reference.nll)


def test_several_variants_score_as_each_does_alone(llama: nn.Module, blocks: Any) -> None:
    plans = {bits: plan_from_scales(llama, inputs="dynamic-per-token", bits=bits) for bits in (3, 8)}
    contexts = {str(bits): (lambda p=plan: QuantizedModel(llama, p)) for bits, plan in plans.items()}
    _, together = compare_many(llama, blocks, contexts)
    for name, context in contexts.items():
        _, alone = compare_tokens(llama, blocks, context)
        np.testing.assert_array_equal(together[name].nll, alone.nll)
        np.testing.assert_array_equal(together[name].kl, alone.kl)


def test_a_prefix_is_read_and_not_scored(llama: nn.Module, blocks: Any) -> None:
    prefix = [0, 5, 7]
    found = score_tokens(llama, blocks, prefix=prefix)
    assert found.nll.shape == (5, 23)
    front = np.broadcast_to(prefix, (5, 3))
    whole = log_softmax(logits_of(llama, np.concatenate([front, blocks], 1)), -1)
    expected = -np.take_along_axis(whole[:, 3:-1], blocks[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5)
    assert np.abs(found.nll - score_tokens(llama, blocks).nll).max() > 1e-3  # the prefix is in context
    reference, _ = compare_tokens(llama, blocks, nullcontext, prefix=prefix)
    np.testing.assert_allclose(reference.nll, expected, rtol=1e-5)


def test_tokens_that_a_model_rules_out_have_no_part_in_kl() -> None:
    ruled_out = torch.zeros(3, 8)
    ruled_out[:, 6:] = -torch.inf
    other = ruled_out.clone()
    other[:, 0] = 2.0
    model = Fixed(ruled_out)
    _, found = compare_tokens(model, np.zeros((1, 3), np.int64), lambda: logits(model, other))
    expected = entropy(np.full(6, 1 / 6), softmax(np.array([2.0, 0, 0, 0, 0, 0])))
    np.testing.assert_allclose(found.kl, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    broken = torch.zeros(3, 8)
    broken[1, 5] = value
    sound = Fixed(torch.zeros(3, 8))
    blocks = np.zeros((1, 3), np.int64)
    with pytest.raises(GateError, match="NaN"):
        score_tokens(Fixed(broken), blocks)
    with pytest.raises(GateError, match="NaN"):
        compare_tokens(sound, blocks, lambda: logits(sound, broken))
    assert score_tokens(sound, blocks).perplexity == pytest.approx(8)


@pytest.mark.parametrize("shape", [(3, 1), (0, 5), (6,)])
def test_blocks_without_anything_to_predict_are_refused(llama: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="nothing to predict"):
        score_tokens(llama, np.zeros(shape, np.int64))


def test_a_model_without_logits_is_refused(minilm_like: nn.Module) -> None:
    with pytest.raises(UsageError, match="no logits"):
        score_tokens(minilm_like, np.zeros((1, 4), np.int64))


@pytest.fixture
def minilm_like(llama: nn.Module) -> nn.Module:
    return llama.model


def test_progress_counts_blocks(llama: nn.Module, blocks: Any) -> None:
    seen: list[tuple[int, int]] = []
    score_tokens(llama, blocks, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
