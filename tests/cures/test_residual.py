# SPDX-License-Identifier: Apache-2.0
"""Readers and writers of the residual stream are found as they are, and what no rotation fits is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calib.cures import find_pairs
from calib.cures.residual import find_residual
from calib.cures.value_heads import find_value_heads
from calib.errors import ModelError
from tests.cures.models import build, pairs_of

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
REFUSED = {
    "olmo_clip": r"layers\.0\.input_layernorm: has no weight that its readers could take over",
    "bert": r"attention\.output\.LayerNorm: also reaches .*output\.LayerNorm past its linear readers",
    "llama4": r"post_attention_layernorm: feeds .*Llama4TextExperts",
    "mixtral": r"post_attention_layernorm: feeds .*MixtralTopKRouter",
    "olmo2": r"q_proj: reads the residual stream without a norm",
    "gemma2": r"o_proj: reaches the residual stream through model\.layers\.0\.post_attention_layernorm",
    "t5": "encoder and decoder have a residual stream each",
    "albert": "reads no tensor of 32 channels",
}


@pytest.mark.parametrize(
    ("name", "rule", "attention", "mlp"),
    [
        ("llama", "norm", ATTENTION, MLP),
        ("qwen2", "norm", ATTENTION, MLP),
        ("gemma", "norm_plus_one", ATTENTION, MLP),
        ("phi3", "norm", ("self_attn.qkv_proj",), ("mlp.gate_up_proj",)),
    ],
)
def test_norms_read_the_stream_and_last_projections_write_it(
    name: str, rule: str, attention: tuple[str, ...], mlp: tuple[str, ...]
) -> None:
    stream = find_residual(build(name), pairs_of(name))
    expected: list[tuple[str, tuple[str, ...]]] = []
    for layer in ("model.layers.0.", "model.layers.1."):
        expected.append((f"{layer}input_layernorm", tuple(layer + n for n in attention)))
        expected.append((f"{layer}post_attention_layernorm", tuple(layer + n for n in mlp)))
    expected.append(("model.norm", ("lm_head",)))
    assert [(r.norm, r.consumers) for r in stream.readers] == expected
    assert {r.rule for r in stream.readers} == {rule}
    assert stream.writers == tuple(
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.o_proj", "mlp.down_proj")
    )
    assert (stream.embedding, stream.head, stream.width) == ("model.embed_tokens", "lm_head", 64)
    assert stream.tied is (name == "gemma")


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "falcon_grouped", "falcon_heads"])
def test_norms_that_subtract_the_mean_ask_the_rotation_to_keep_it(name: str) -> None:
    stream = find_residual(build(name), pairs_of(name))
    assert stream.keeps_mean
    assert stream.places == {"gpt2": ("transformer.wpe",), "opt": ("model.decoder.embed_positions",)}.get(name, ())
    assert not find_residual(build("llama"), pairs_of("llama")).keeps_mean


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rotation_fits_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]):
        find_residual(build(name), pairs_of(name))


def test_half_precision_is_read_in_float32() -> None:
    model = build("llama").bfloat16()
    assert find_residual(model, pairs_of("llama")) == find_residual(build("llama"), pairs_of("llama"))


def test_searching_changes_nothing(family: str) -> None:
    model = build(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        find_residual(model, pairs_of(family))
    except ModelError:
        assert family in REFUSED
    find_value_heads(model, pairs_of(family))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_as_wide_as_the_stream_is_no_writer_unless_it_writes() -> None:
    """Four key heads of 16 make k_proj and v_proj 64 wide, as the stream is; so is up_proj here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.cures.models import LLAMA_LIKE

    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "num_key_value_heads": 4, "intermediate_size": 64})).eval()
    assert find_residual(model, find_pairs(model)).writers == find_residual(build("llama"), pairs_of("llama")).writers


def test_a_scaled_residual_path_is_still_the_stream() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    from tests.cures.models import LLAMA_LIKE

    settings: dict[str, Any] = {**LLAMA_LIKE, "residual_multiplier": 0.3, "embedding_multiplier": 7.0}
    model = GraniteForCausalLM(GraniteConfig(**settings)).eval()
    assert len(find_residual(model, find_pairs(model)).writers) == 4


class Outside(nn.Module):
    """Adds what it learned to the embedding, so that the stream has a writer that no block shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.place = inner, nn.Parameter(torch.randn(64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(tokens) + self.place
        return result


def test_parameters_outside_of_the_blocks_are_not_overlooked() -> None:
    model = build("llama")
    model.model.extra = Outside(nn.Identity())
    with pytest.raises(ModelError, match=r"model\.extra: is outside of the blocks"):
        find_residual(model, pairs_of("llama"))


def test_a_model_without_a_head_is_refused() -> None:
    model = build("llama").model
    with pytest.raises(ModelError, match="has no output head"):
        find_residual(model, find_pairs(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_grouped", "phi3", "bert", "t5"])
def test_values_may_be_mixed_within_a_head_and_products_not_at_all(name: str) -> None:
    heads = find_value_heads(build(name), pairs_of(name))
    assert {h.size for h in heads} == {16}
    linear = [pair.name for pair in pairs_of(name) if pair.rule == "linear"]
    products = [pair for pair in linear if "up_proj" in pair or "DenseReluDense" in pair]
    assert [h.pair.name for h in heads] == [pair for pair in linear if pair not in products]


def test_heads_are_told_apart_also_where_queries_are_weak() -> None:
    """All heads then take nearly the same mean over tokens, and mixing two of them would hardly be seen."""
    model = build("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(1e-4)
            layer.attention.self.query.bias.zero_()
    assert {h.size for h in find_value_heads(model, pairs_of("bert"))} == {16}
