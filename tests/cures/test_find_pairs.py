# SPDX-License-Identifier: Apache-2.0
"""Pairs are found as they are in each architecture, and what cannot be smoothed is named with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.cures import Pairs, find_pairs
from calib.errors import ModelError
from tests.cures.models import build, pairs_of

GATED = [
    ("{norm1}", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("self_attn.v_proj", ["self_attn.o_proj"]),
    ("{norm2}", ["mlp.gate_proj", "mlp.up_proj"]),
    ("mlp.up_proj", ["mlp.down_proj"]),
]


def gated(norm1: str = "input_layernorm", norm2: str = "post_attention_layernorm") -> list[tuple[str, list[str]]]:
    return [(name.format(norm1=norm1, norm2=norm2), consumers) for name, consumers in GATED]


EXPECTED: dict[str, tuple[str, list[tuple[str, list[str]]]]] = {
    "llama": ("model.layers.", gated()),
    "qwen2": ("model.layers.", gated()),
    "gemma": ("model.layers.", gated()),
    "gemma2": ("model.layers.", gated(norm2="pre_feedforward_layernorm")),
    "gpt2": (
        "transformer.h.",
        [("ln_1", ["attn.c_attn"]), ("attn.c_attn[128:192]", ["attn.c_proj"]), ("ln_2", ["mlp.c_fc"])],
    ),
    "falcon": (
        "transformer.h.",
        [
            ("input_layernorm", ["self_attention.query_key_value", "mlp.dense_h_to_4h"]),
            ("self_attention.query_key_value[80:96]", ["self_attention.dense"]),
        ],
    ),
    "falcon_grouped": (
        "transformer.h.",
        [
            ("ln_attn", ["self_attention.query_key_value"]),
            ("ln_mlp", ["mlp.dense_h_to_4h"]),
            ("self_attention.query_key_value[48:128, 32 rows]", ["self_attention.dense"]),
        ],
    ),
    "falcon_heads": (
        "transformer.h.",
        [
            ("input_layernorm", ["self_attention.query_key_value"]),
            ("self_attention.query_key_value[32:192, 64 rows]", ["self_attention.dense"]),
            ("post_attention_layernorm", ["mlp.dense_h_to_4h"]),
        ],
    ),
    "phi3": (
        "model.layers.",
        [
            ("input_layernorm", ["self_attn.qkv_proj"]),
            ("self_attn.qkv_proj[96:128]", ["self_attn.o_proj"]),
            ("post_attention_layernorm", ["mlp.gate_up_proj"]),
            ("mlp.gate_up_proj[96:192]", ["mlp.down_proj"]),
        ],
    ),
    "bert": ("bert.encoder.layer.", [("attention.self.value", ["attention.output.dense"])]),
    "mixtral": ("model.layers.", gated()[:2]),
    "diffllama": ("model.layers.", [gated()[0], *gated()[2:]]),  # a norm without a weight is behind its values
    "olmo2": ("model.layers.", [gated()[1], gated()[3]]),
    "olmo_clip": ("model.layers.", [gated()[3]]),
    "opt": (
        "model.decoder.layers.",
        [
            ("self_attn_layer_norm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("self_attn.v_proj", ["self_attn.out_proj"]),
            ("final_layer_norm", ["fc1"]),
            ("fc1", ["fc2"]),  # a ReLU is between them, and s > 0 passes it
        ],
    ),
}


def described(pairs: Pairs) -> list[tuple[str, list[str]]]:
    return [(pair.name, [c.module for c in pair.consumers]) for pair in pairs]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_pair_of_an_architecture_is_found_and_no_other(name: str) -> None:
    prefix, block = EXPECTED[name]
    expected = [
        (f"{prefix}{layer}.{producer}", [f"{prefix}{layer}.{c}" for c in consumers])
        for layer in range(2)
        for producer, consumers in block
    ]
    assert described(pairs_of(name)) == expected


def test_shared_layers_make_one_pair_for_all_calls() -> None:
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention."
    assert described(pairs_of("albert")) == [(f"{layer}value", [f"{layer}dense"])]


def test_encoder_and_decoder_are_searched() -> None:
    found = dict(described(pairs_of("t5")))
    assert len(found) == 20
    cross = "decoder.block.1.layer.1."
    assert found[f"{cross}layer_norm"] == [f"{cross}EncDecAttention.q"]
    assert found[f"{cross}EncDecAttention.v"] == [f"{cross}EncDecAttention.o"]


@pytest.mark.parametrize(("name", "rule"), [("gemma", "norm_plus_one"), ("llama", "norm"), ("opt", "norm")])
def test_the_rule_of_a_norm_is_found_by_trying(name: str, rule: str) -> None:
    assert {pair.rule for pair in pairs_of(name) if "norm" in pair.producer} == {rule}


def test_each_value_row_feeds_the_heads_that_share_it() -> None:
    pair = pairs_of("llama")["model.layers.0.self_attn.v_proj"]
    heads = np.arange(32).reshape(2, 1, 16)
    assert pair.channels == 32
    np.testing.assert_array_equal(pair.consumers[0].channels, np.broadcast_to(heads, (2, 2, 16)).ravel())


def test_values_of_grouped_fused_projections_are_the_right_rows() -> None:
    pair = pairs_of("falcon_grouped")["transformer.h.1.self_attention.query_key_value"]
    np.testing.assert_array_equal(pair.rows, [*range(48, 64), *range(112, 128)])


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("mixtral", "model.layers.1.mlp.gate", "MixtralTopKRouter"),
        ("mixtral", "model.layers.1.mlp.experts", "is no linear layer"),
        ("bert", "bert.encoder.layer.1.intermediate.dense", "residual path"),
        ("bert", "bert.encoder.layer.0.output.dense", "non-linear function"),
        ("diffllama", "model.layers.1.self_attn.o_proj", "RMSNorm that its own weight does not scale"),
        ("olmo2", "model.layers.1.mlp.up_proj", "reads the residual stream"),
        ("olmo_clip", "model.layers.0.self_attn.o_proj", "non-linear function"),
        ("gpt2", "transformer.h.1.mlp.c_proj", "non-linear function"),
        ("llama", "lm_head", "not inside a block"),
    ],
)
def test_what_cannot_be_smoothed_is_named_with_its_reason(name: str, layer: str, reason: str) -> None:
    skipped = pairs_of(name).skipped
    assert reason in skipped[layer]


def test_every_linear_layer_is_either_a_consumer_or_skipped(family: str) -> None:
    model = build(family)
    pairs = pairs_of(family)
    consumers = {c.module for pair in pairs for c in pair.consumers}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    assert consumers <= linear
    assert not consumers & set(pairs.skipped)
    assert linear <= consumers | set(pairs.skipped)


def test_searching_changes_nothing(family: str) -> None:
    model = build(family)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_pairs(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_gives_the_same_pairs() -> None:
    model = build("llama")
    expected = described(pairs_of("llama"))
    model.bfloat16()
    assert described(find_pairs(model)) == expected
    assert model.dtype == torch.bfloat16


def test_tied_weights_are_left_alone() -> None:
    model = build("llama")
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    pairs = find_pairs(model)
    assert "tied to model.layers.1.self_attn.o_proj" in pairs.skipped["model.layers.0.self_attn.o_proj"]
    assert [p.name for p in pairs if "v_proj" in p.name] == []


class Block(nn.Module):
    """A norm, an expert per parity of the token's sum that may see no token, and a dropout of state."""

    def __init__(self, *, lonely: bool = False, count: bool = False) -> None:
        super().__init__()
        self.norm, self.one, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.lonely, self.count, self.calls = lonely, count, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        self.calls += 1
        z = self.one(y) + (self.calls if self.count else 0)
        return x + z if self.lonely else x + z + self.other(y)


def plain(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**settings) for _ in range(2)))


def test_a_plain_module_is_searched_with_an_example() -> None:
    assert described(find_pairs(plain(), torch.randn(2, 16, 8))) == [
        ("0.norm", ["0.one", "0.other"]),
        ("1.norm", ["1.one", "1.other"]),
    ]


def test_a_layer_that_saw_no_token_might_read_the_same_tensor() -> None:
    pairs = find_pairs(plain(lonely=True), torch.randn(2, 16, 8))
    assert len(pairs) == 0
    assert "0.other, which saw no token" in pairs.skipped["0.one"]


def test_a_block_with_a_state_is_not_judged() -> None:
    pairs = find_pairs(plain(count=True), torch.randn(2, 16, 8))
    assert len(pairs) == 0
    assert "has a state" in pairs.skipped["0.one"]


def test_a_model_without_tokens_needs_an_example() -> None:
    with pytest.raises(ModelError, match="pass a dictionary of example inputs"):
        find_pairs(plain())


def test_an_example_that_does_not_run_is_one_line() -> None:
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        find_pairs(plain(), torch.randn(2, 16, 9))
