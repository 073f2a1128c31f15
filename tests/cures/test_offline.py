# SPDX-License-Identifier: Apache-2.0
"""A model whose residual stream and values are rotated computes the same, and goes back to the very bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calib.cures import OfflineRotation, OnlineRotation, find_pairs
from calib.errors import ModelError, UsageError
from calib.schema.scales import CureRecord
from tests.cures.models import build, logits, pairs_of
from tests.cures.test_fold import bits, random_smoothing, same_bits
from tests.cures.test_rotate import relative, seen_by, unhooked

WHOLE = ["llama", "qwen2", "gemma", "phi3", "gpt2", "opt", "falcon", "falcon_grouped", "falcon_heads"]
HEADS = [
    "gpt2",
    "bert",
    "mixtral",
    "opt",
    "falcon_grouped",
    "falcon_heads",
    "olmo2",
    "gemma2",
    "t5",
    "albert",
    "llama4",
]


def found(name: str, model: Any, **settings: Any) -> OfflineRotation:
    return OfflineRotation.find(model, pairs_of(name), untie=True, **settings)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("heads", [True, False])
def test_a_rotated_stream_keeps_the_logits(name: str, heads: bool) -> None:
    model = build(name)
    expected, before, head = logits(model), bits(model), model.lm_head.weight
    rotated = found(name, model, heads=heads, seed=3).apply(model)
    assert not any(torch.equal(before[n], model.get_parameter(n)) for n in rotated.names)
    assert relative(logits(model), expected) < 1e-4
    rotated.revert()
    assert same_bits(model, before)
    assert model.lm_head.weight is head
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_rotated_values_keep_the_logits_of_models_whose_stream_cannot_be(name: str) -> None:
    model = build(name)
    expected, before = logits(model), bits(model)
    rotated = found(name, model, residual=False).apply(model)
    assert relative(logits(model), expected) < 1e-4
    assert rotated.names
    rotated.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_a_stream_that_cannot_be_rotated_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelError, match=r"output\.LayerNorm past its linear readers|MixtralTopKRouter"):
        found(name, build(name))


def test_a_bias_without_a_weight_is_refused_and_nothing_changes() -> None:
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[4] = 0
    before = bits(model)
    rotation = found("gpt2", model)
    with pytest.raises(ModelError, match=r"h\.1\.ln_2: adds a bias where its weight is 0"):
        rotation.apply(model)
    assert same_bits(model, before)
    with torch.no_grad():
        model.transformer.h[1].ln_2.bias[4] = 0
    expected = logits(model)
    rotation.apply(model)
    assert relative(logits(model), expected) < 1e-4


def test_norms_keep_no_weight_and_what_they_feed_is_the_rotated_stream() -> None:
    for name, unit in (("llama", 1.0), ("gemma", 0.0)):
        model = build(name)
        with found(name, model).apply(model):
            norms = [m.weight for n, m in model.named_modules() if "norm" in n]
            assert len(norms) == 5
            assert all(bool((weight == unit).all()) for weight in norms)


def test_a_peak_of_the_stream_is_spread_over_all_channels() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += 100 * model.model.embed_tokens.weight.std()
    reads = "model.layers.0.input_layernorm"
    before = seen_by(model, reads)
    with found("llama", model).apply(model):
        after = seen_by(model, reads)
    assert float(before.abs().max() / before.square().mean().sqrt()) > 7.5  # of 8, the root of 64 channels
    assert float(after.abs().max() / after.square().mean().sqrt()) < 2
    torch.testing.assert_close(before.square().sum(-1), after.square().sum(-1), rtol=1e-4, atol=0)


def test_a_tied_head_is_untied_only_if_asked() -> None:
    model = build("gemma")
    before = bits(model)
    with pytest.raises(UsageError, match=r"lm_head: shares its weight with model\.embed_tokens.*pass untie=True"):
        OfflineRotation.find(model, pairs_of("gemma"))
    with found("gemma", model).apply(model):
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert same_bits(model, before)
    OfflineRotation.find(model, pairs_of("gemma"), residual=False).apply(model)


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "gpt2", "falcon"])
def test_the_result_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(name)
    expected = logits(model)
    found(name, model).apply(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert relative(logits(loaded), expected) < 1e-4


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("rotation_first", [True, False])
def test_it_composes_with_smoothing_in_both_orders(name: str, rotation_first: bool) -> None:
    model = build(name)
    expected, before = logits(model), bits(model)
    rotation, smoothing = found(name, model), random_smoothing(pairs_of(name))
    first, second = [c.apply(model) for c in ((rotation, smoothing) if rotation_first else (smoothing, rotation))]
    assert relative(logits(model), expected) < 1e-4
    with pytest.raises(ModelError, match="revert the later cure first"):
        first.revert()
    second.revert()
    first.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3"])
@pytest.mark.parametrize("online_first", [True, False])
def test_it_composes_with_rotated_inputs_in_both_orders(name: str, online_first: bool) -> None:
    model = build(name)
    expected, before = logits(model), bits(model)
    offline = found(name, model)
    online = OnlineRotation.by_role(model, ("mlp_output", "attention_output"), signs_seed=5)
    first, second = [c.apply(model) for c in ((online, offline) if online_first else (offline, online))]
    assert relative(logits(model), expected) < 1e-4
    second.revert()
    first.revert()
    assert same_bits(model, before)
    assert unhooked(model)


def test_pairs_are_the_same_after_a_rotation() -> None:
    model = build("llama")
    with found("llama", model).apply(model):
        assert [p.name for p in find_pairs(model)] == [p.name for p in pairs_of("llama")]


def test_the_bits_return_on_an_error() -> None:
    model = build("gemma")
    before = bits(model)

    def broken() -> None:
        with found("gemma", model).apply(model):
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        broken()
    assert same_bits(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_logits_that_differ_refuse_the_rotation_and_nothing_changes() -> None:
    """The stream as it was found, and then a writer that is not in it."""
    model = build("gemma")
    rotation = found("gemma", model)
    assert rotation.stream is not None
    object.__setattr__(rotation.stream, "writers", rotation.stream.writers[:-1])
    before = bits(model)
    with pytest.raises(ModelError, match=r"its logits change by 0\.\d+ of their size"):
        rotation.apply(model)
    assert same_bits(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_a_shared_layer_is_refused_and_nothing_changes() -> None:
    model = build("llama")
    rotation = found("llama", model)
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    before = bits(model)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj\.weight: is shared with"):
        rotation.apply(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    model, wide = build("llama").to(dtype), build("llama").to(dtype).float()
    found("llama", model).apply(model)
    found("llama", wide).apply(wide)
    for name, parameter in wide.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter.detach().to(dtype), rtol=0, atol=0)


def test_nothing_to_rotate_is_said() -> None:
    with pytest.raises(UsageError, match="no values were found to rotate"):
        found("olmo_clip", build("olmo_clip"), residual=False)


def test_the_record_needs_nothing_of_a_consumer() -> None:
    rotation = found("gemma", build("gemma"), seed=8)
    record = rotation.record()
    assert CureRecord.model_validate_json(record.model_dump_json()) == record
    assert (record.kind, record.needs) == ("rotate", "nothing")
    assert record.settings == {
        "where": "weights",
        "residual": True,
        "heads": [f"model.layers.{i}.self_attn.v_proj" for i in range(2)],
        "untied": True,
        "signs_seed": 8,
    }
