# SPDX-License-Identifier: Apache-2.0
"""Keys and values: rounded as attention gets them, after rotary embedding, at 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calib.corpus import build_blocks
from calib.errors import UsageError
from calib.measurement.engine import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, plan_from_scales
from calib.quantized.quantizers import StaticQuantizer
from calib.scales import choose_scales
from calib.sites.attention import watch_attention


def attended(model: Any, ids: torch.Tensor, plan: QuantizationPlan | None) -> dict[str, torch.Tensor]:
    """Query, key, value and output of the first attention."""
    found: dict[str, torch.Tensor] = {}
    attention = model.model.layers[0].self_attn
    # this context is entered first, so that what is quantized reaches it
    with torch.no_grad(), watch_attention({id(attention): lambda part, x: found.update({part: x.clone()})}):
        if plan is None:
            model(input_ids=ids)
        else:
            with QuantizedModel(model, plan) as quantized:
                model(input_ids=ids)
            assert quantized.silent() == []
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["static", "dynamic-per-token"])
def test_keys_and_values_are_rounded_and_queries_are_not(tiny_llama: Path, mode: Any, bits: int) -> None:
    opened = open_model(tiny_llama, device="cpu", dtype="float32")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=32)
    scales = choose_scales(measure(opened, blocks, MeasureOptions()))
    ids = torch.from_numpy(blocks.input_ids)
    plan = plan_from_scales(opened.model, scales, inputs="none", weights=None, kv_cache=mode, kv_bits=bits)
    plain, rounded = attended(opened.model, ids, None), attended(opened.model, ids, plan)
    qmax = {8: 127, 4: 7}[bits]
    assert torch.equal(rounded["query"], plain["query"])
    for part in ("key", "value"):
        x = plain[part]
        amax = x.abs().amax(-1, keepdim=True) if mode == "dynamic-per-token" else x.abs().max()
        # the measurement saw these very blocks
        step = amax / qmax
        torch.testing.assert_close(rounded[part], torch.round(x / step) * step, rtol=0, atol=float(step.max()) * 1e-3)
        assert not torch.equal(rounded[part], x)


def test_what_the_cache_holds_stays_in_float(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu", dtype="float32").model
    plan = plan_from_scales(model, inputs="none", weights=None, kv_cache="dynamic-per-token", bits=4)
    ids = torch.arange(20).reshape(1, 20) + 20
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=True)
        with QuantizedModel(model, plan):
            rounded = model(input_ids=ids, use_cache=True)
    assert not torch.equal(plain.logits, rounded.logits)
    first = [out.past_key_values.layers[0].keys for out in (plain, rounded)]
    assert torch.equal(*first)


def test_scales_per_head_and_per_channel_follow_the_layout() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    heads, channels = torch.tensor([0.1, 0.2, 0.4]), torch.rand(12) + 0.1
    grid = IntegerGrid.of(4)
    by_head = StaticQuantizer(grid, heads, axes="heads")(x)
    by_channel = StaticQuantizer(grid, channels, axes="heads")(x)
    for head in range(3):
        whole = x[:, head]
        assert torch.equal(by_head[:, head], (whole / heads[head]).round().clamp(-7, 7) * heads[head])
        step = channels[4 * head : 4 * head + 4]
        assert torch.equal(by_channel[:, head], (whole / step).round().clamp(-7, 7) * step)


def test_attention_computed_inline_is_named() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    for layers, name in ((2, "transformer.h.1.self_attention:key"), (1, "transformer.h.0.self_attention:value")):
        config = FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2)
        plan = plan_from_scales(FalconForCausalLM(config), inputs="dynamic-per-token", kv_cache="dynamic-per-token")
        assert not plan.attention
        assert "attention" in plan.left_out[name]


def test_static_keys_need_a_scale_file(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    with pytest.raises(UsageError, match="need a scale file"):
        plan_from_scales(model, inputs="none", kv_cache="static")
