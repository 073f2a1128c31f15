# SPDX-License-Identifier: Apache-2.0
"""Plans: what they leave out and why, what a scale file lacks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.errors import ModelError, UsageError
from calib.models import open_model
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.quantizers import DynamicQuantizer, Float8Quantizer
from calib.quantized.rounding import round_to_nearest
from calib.scales.float8 import float8
from tests.quantized.test_model import opened_with_scales, run


def test_what_the_plan_leaves_out_has_its_reason(tiny_llama: Path) -> None:
    opened, scales, _ = opened_with_scales(tiny_llama, ignore=["*.down_proj:input"])
    plan = plan_from_scales(opened.model, scales, ignore=["re:.*layers.0.*q_proj"])
    linears = {n for n, m in opened.model.named_modules() if isinstance(m, nn.Linear)}
    assert linears == set(plan.weights) | (set(plan.left_out) & linears)
    assert plan.left_out["model.layers.1.mlp.down_proj"] == "the scale file leaves it in float"
    assert plan.left_out["model.layers.0.self_attn.q_proj"] == "ignored on request"
    assert plan.left_out["model.embed_tokens.weight"].startswith("an embedding")
    shorter = plan.without({"model.layers.2.mlp.up_proj": "sensitive"})
    assert shorter.left_out["model.layers.2.mlp.up_proj"] == "sensitive"
    assert "model.layers.2.mlp.up_proj" not in shorter.weights
    assert "model.layers.2.mlp.up_proj" not in shorter.inputs


def test_static_float8_takes_amax_over_448_from_the_ranges(tiny_llama: Path) -> None:
    opened, scales, ids = opened_with_scales(tiny_llama)
    model = opened.model
    plan = plan_from_scales(model, scales, dtype="float8", kv_cache="static")
    readers = {r: t for n, t in scales.tensors.items() for r in [n, *t.shared_with]}
    for name, quantizer in plan.inputs.items():
        amax = readers[f"{name}:input"].amax
        assert isinstance(quantizer, Float8Quantizer)
        assert quantizer.scale == torch.tensor(amax) / torch.tensor(448.0)
    layer, seen = "model.layers.1.mlp.down_proj", []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    plain = run(model, ids)
    handle.remove()
    alone = plan.without({n: "not in this test" for n in [*plan.inputs, *plan.attention] if n != layer})
    with QuantizedModel(model, alone) as quantized:
        handle = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        run(model, ids)
        handle.remove()
        weight = model.get_submodule(layer).weight.detach().clone()
        assert quantized.silent() == []
    scale = plan.inputs[layer].scale
    assert torch.equal(seen[1], torch.from_numpy(float8((seen[0] / scale).numpy())).float() * scale)
    own = model.get_submodule(layer).weight.detach()
    scale = own.abs().amax(1, keepdim=True) / 448
    assert torch.equal(weight, torch.from_numpy(float8((own / scale).numpy())).float() * scale)
    with QuantizedModel(model, plan) as quantized:
        torch.testing.assert_close(run(model, ids), plain, rtol=0.1, atol=0.1)
    assert quantized.silent() == []


def test_what_a_scale_file_lacks_is_named_and_what_it_calls_dynamic_is(tiny_llama: Path) -> None:
    opened, scales, _ = opened_with_scales(tiny_llama, ignore=["*:key", "*.layers.0.*up_proj:input"])
    tensors = dict(scales.tensors)
    name = "model.layers.1.mlp.down_proj:input"
    scheme = tensors[name].scheme.model_copy(update={"dynamic": True, "granularity": "per-token"})
    tensors[name] = tensors[name].model_copy(update={"scale": None, "scheme": scheme})
    scales = scales.model_copy(update={"tensors": tensors, "ignore": []})
    plan = plan_from_scales(opened.model, scales, kv_cache="static")
    assert plan.inputs["model.layers.1.mlp.down_proj"] == DynamicQuantizer(IntegerGrid.of(8))
    assert plan.left_out["model.layers.0.mlp.up_proj"] == "its input was not measured, or was zero"
    assert "not measured" in plan.left_out["model.layers.2.self_attn:key"]
    assert all(set(parts) == {"value"} for parts in plan.attention.values())


def test_weights_that_cannot_be_rounded_are_refused() -> None:
    row = WeightScheme(IntegerGrid.of(8))
    with (
        pytest.raises(ModelError, match="not in memory"),
        QuantizedModel(nn.Linear(4, 4, device="meta"), QuantizationPlan(weights={"": row})),
    ):
        pass
    with (
        pytest.raises(UsageError, match="no parameter"),
        QuantizedModel(nn.ReLU(), QuantizationPlan(weights={"": row})),
    ):
        pass
    codes = round_to_nearest(torch.randn(4, 4), row)
    with (
        pytest.raises(UsageError, match="cannot be trained"),
        QuantizedModel(nn.Linear(4, 4), QuantizationPlan(weights={"": codes}), trainable=True),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"codes \[4, 4\]"),
        QuantizedModel(nn.Linear(4, 8), QuantizationPlan(weights={"": codes})),
    ):
        pass
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2))
    model.append(nn.Linear(4, 4))
    plan = plan_from_scales(model, inputs="dynamic-per-token")
    assert list(plan.weights) == ["2"]
    assert "parametrized" in plan.left_out["0"]
    assert "MultiheadAttention" in plan.left_out["1.out_proj"]
    assert "1.in_proj_weight" in plan.left_out


def test_fused_experts_are_named() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
    )
    model = Qwen3MoeForCausalLM(config)
    plan = plan_from_scales(model, inputs="dynamic-per-token")
    covered = {f"{n}.weight" for n in plan.weights} | set(plan.left_out)
    covered |= {f"{n}.weight" for n in plan.left_out}
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert matrices <= covered
    assert "experts" in plan.left_out["model.layers.0.mlp.experts.gate_up_proj"]


def test_plans_that_cannot_be_are_refused(tiny_llama: Path, tiny_bert: Path) -> None:
    opened, scales, _ = opened_with_scales(tiny_llama)
    with pytest.raises(UsageError, match="need a scale file"):
        plan_from_scales(opened.model)
    with pytest.raises(UsageError, match="unknown"):
        plan_from_scales(opened.model, scales, inputs="maybe")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="matches no linear"):
        plan_from_scales(opened.model, scales, ignore=["nothing"])
    with pytest.raises(ModelError, match="nothing to quantize"):
        plan_from_scales(open_model(tiny_bert, device="cpu").model, scales)
    plan = plan_from_scales(opened.model, scales)
    with pytest.raises(UsageError, match="no such module"):
        QuantizedModel(nn.Linear(2, 2), plan)
    with pytest.raises(UsageError, match="not in the plan"):
        plan.without({"nothing": "reason"})
    with pytest.raises(UsageError, match="no part of attention"):
        QuantizationPlan(attention={"a": {"output": DynamicQuantizer(IntegerGrid.of(8))}})
    with pytest.raises(UsageError, match="skip positions -1"):
        plan_from_scales(opened.model, scales, skip_positions=-1)
    with QuantizedModel(opened.model, plan) as quantized, pytest.raises(UsageError, match="open already"):
        quantized.__enter__()
