# SPDX-License-Identifier: Apache-2.0
"""Published names for architectures that the paper measured differently, or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AlbertConfig, AlbertModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config, T5Model

from calib.measurement import Calibration
from calib.measurement.artifact import Measurement
from calib.measurement.site import Site
from calib.protocols.massive_tokens import massive_tokens
from calib.protocols.max_activations import joined
from calib.protocols.paper_sites import PaperSite, paper_sites


def named(model: Any, measurement: Measurement, **inputs: Any) -> dict[PaperSite, list[Site]]:
    calibration = Calibration(model.eval())
    ids = torch.arange(32).reshape(2, 16)
    with torch.no_grad(), calibration, massive_tokens(calibration):
        model(input_ids=ids, **inputs)
    return paper_sites(replace(measurement, sites=calibration.sites()))


def test_mixtures_of_experts_have_a_router_and_one_mlp_output(massive_run: Any) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    sites = named(Qwen3MoeForCausalLM(config), massive_run[2])
    layer = [f"layer_0_{kind}" for kind in ("attn_output", "mlp_output", "hidden", "moe_gate")]
    assert [site.name for site in sites] == ["embedding_output", *layer, "final_layernorm"]
    tokens = sites[PaperSite("mlp_output", 0)][0].statistics.ratios
    assert tokens is not None
    assert tokens.tokens.sum() == 32


def test_the_decoder_has_the_plain_names_and_the_encoder_a_prefix(massive_run: Any) -> None:
    model = T5Model(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    sites = named(model, massive_run[2], decoder_input_ids=torch.arange(32).reshape(2, 16))
    assert sites[PaperSite("hidden", 1)][0].name == "decoder.block.1:output"
    assert sites[PaperSite("hidden", 1, "encoder.block")][0].name == "encoder.block.1:output"
    assert {PaperSite("final_layernorm"), PaperSite("final_layernorm", None, "encoder")} <= set(sites)
    attentions = [site.name for site in sites[PaperSite("attn_output", 0)]]
    assert attentions == [f"decoder.block.0.layer.{i}.{name}.o:output" for i, name in
                          ((0, "SelfAttention"), (1, "EncDecAttention"))]  # fmt: skip


def test_calls_of_a_shared_block_are_one_site_as_hooks_on_it_see_them(massive_run: Any) -> None:
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    held = named(AlbertModel(config), massive_run[2])[PaperSite("hidden", 0)]
    assert len(held) == 3
    together = joined(held).statistics
    assert together.range.amax == max(site.statistics.range.amax for site in held)
    assert together.range.count_all == sum(site.statistics.range.count_all for site in held) == 3 * 32 * 32
    assert together.ratios is not None
    assert together.ratios.tokens.sum() == 3 * 32
