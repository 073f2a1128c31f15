# SPDX-License-Identifier: Apache-2.0
"""Folding keeps the function of a model, and reverting puts the very bits back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from calib.cures import Pairs, Smoothing, fold
from calib.errors import ModelError
from tests.cures.models import build, logits, pairs_of


def random_smoothing(pairs: Pairs, seed: int = 0) -> Smoothing:
    rng = np.random.default_rng(seed)
    scales = tuple(np.exp(rng.uniform(-2, 2, pair.channels)).astype(np.float32) for pair in pairs)
    return Smoothing(pairs.pairs, (0.5,) * len(pairs), scales)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_random_scales_keep_the_logits(family: str) -> None:
    model = build(family)
    pairs = pairs_of(family)
    expected, before = logits(model), bits(model)
    folded = random_smoothing(pairs).apply(model)
    changed = {f"{p.producer}.weight" for p in pairs} | {f"{c.module}.weight" for p in pairs for c in p.consumers}
    assert changed <= set(folded.names)
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in changed)
    result = logits(model)
    assert float((result - expected).abs().max() / expected.abs().max()) < 1e-4
    folded.revert()
    assert same_bits(model, before)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_consumer_input_is_divided_by_its_scales(name: str) -> None:
    model = build(name)
    pairs = pairs_of(name)
    seen: dict[str, torch.Tensor] = {}
    for pair in pairs:
        for consumer in pair.consumers:
            module = model.get_submodule(consumer.module)
            module.register_forward_pre_hook(lambda _, args, key=consumer.module: seen.__setitem__(key, args[0]))
    logits(model)
    before = dict(seen)
    smoothing = random_smoothing(pairs)
    with smoothing.apply(model):
        logits(model)
    for pair, scales in zip(smoothing.pairs, smoothing.scales, strict=True):
        for consumer in pair.consumers:
            expected = before[consumer.module] / torch.from_numpy(scales[consumer.channels])
            torch.testing.assert_close(seen[consumer.module], expected, rtol=1e-4, atol=1e-5)


def test_the_context_reverts_also_on_an_error() -> None:
    model = build("llama")
    before = bits(model)
    smoothing = random_smoothing(pairs_of("llama"))

    def broken() -> None:
        with smoothing.apply(model):
            assert not same_bits(model, before)
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        broken()
    assert same_bits(model, before)


def test_two_smoothings_compose_and_revert_in_reverse_order() -> None:
    model = build("gemma2")
    pairs = pairs_of("gemma2")
    expected, before = logits(model), bits(model)
    first = random_smoothing(pairs, 1).apply(model)
    between = bits(model)
    second = random_smoothing(pairs, 2).apply(model)
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-4
    with pytest.raises(ModelError, match="revert the later cure first"):
        first.revert()
    second.revert()
    assert same_bits(model, between)
    first.revert()
    assert same_bits(model, before)


def test_a_second_revert_does_nothing() -> None:
    model = build("llama")
    folded = random_smoothing(pairs_of("llama")).apply(model)
    folded.revert()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    changed = bits(model)
    folded.revert()
    assert same_bits(model, changed)


def test_a_weight_of_two_pairs_is_rounded_once() -> None:
    """up_proj reads a norm (columns) and feeds down_proj (rows)."""
    model = build("llama").bfloat16()
    pairs = pairs_of("llama")
    norm, up = pairs["model.layers.0.post_attention_layernorm"], pairs["model.layers.0.mlp.up_proj"]
    weight = model.model.layers[0].mlp.up_proj.weight
    original = weight.detach().float()
    rng = np.random.default_rng(0)
    columns, rows = (np.exp(rng.uniform(-1, 1, n)).astype(np.float32) for n in (64, 96))
    fold(model, [norm, up], [columns, rows])
    expected = (original * torch.from_numpy(columns)) * torch.from_numpy(np.float32(1) / rows)[:, None]
    torch.testing.assert_close(weight.detach(), expected.bfloat16(), rtol=0, atol=0)


def test_an_overflow_is_refused_and_changes_nothing() -> None:
    model = build("llama").half()
    before = bits(model)
    pairs = pairs_of("llama")
    scales = tuple(np.full(pair.channels, 1e-7, np.float32) for pair in pairs)
    with pytest.raises(ModelError, match=r"does not fit torch\.float16"):
        fold(model, pairs.pairs, scales)
    assert same_bits(model, before)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_and_finite(bad: float) -> None:
    model = build("llama")
    pairs = pairs_of("llama")
    scales = [np.ones(pair.channels, np.float32) for pair in pairs]
    scales[2][7] = bad
    with pytest.raises(ModelError, match="positive scales"):
        fold(model, pairs.pairs, scales)


@pytest.mark.parametrize(("other", "message"), [("opt", "is not in OPTForCausalLM"), ("olmo2", "is not in Olmo2")])
def test_pairs_of_another_model_are_refused(other: str, message: str) -> None:
    smoothing = random_smoothing(pairs_of("llama"))
    model = build(other)
    before = bits(model)
    with pytest.raises(ModelError, match=message):
        smoothing.apply(model)
    assert same_bits(model, before)


def test_pairs_of_another_size_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.cures.models import LLAMA_LIKE

    smoothing = random_smoothing(pairs_of("llama"))
    with pytest.raises(ModelError, match="has 80 channels here, not 96"):
        smoothing.without(["model.layers.0.post_attention_layernorm"]).apply(
            LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "intermediate_size": 80}))
        )


def test_a_pair_can_be_left_out() -> None:
    smoothing = random_smoothing(pairs_of("phi3"))
    name = "model.layers.1.mlp.gate_up_proj"
    rest = smoothing.without([name])
    assert len(rest.pairs) == len(rest.scales) == len(rest.alphas) == len(smoothing.pairs) - 1
    assert name not in {pair.producer for pair in rest.pairs}
