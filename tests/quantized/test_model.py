# SPDX-License-Identifier: Apache-2.0
"""Whole models: what is rounded, what is not, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calib.corpus import build_blocks
from calib.errors import UsageError
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.quantizers import DynamicQuantizer, StaticQuantizer
from calib.scales import choose_scales
from calib.schema.scales import ScaleFile


def opened_with_scales(folder: Path, **options: Any) -> tuple[OpenedModel, ScaleFile, torch.Tensor]:
    opened = open_model(folder, device="cpu", dtype="float32")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=4, max_length=32)
    scales = choose_scales(measure(opened, blocks, MeasureOptions()), **options)
    return opened, scales, torch.from_numpy(blocks.input_ids[:2])


def first_output(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return first_output(model(input_ids=ids))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(model: nn.Module, scales: ScaleFile, ids: torch.Tensor) -> torch.Tensor:
    """An independent emulation: weights and inputs of every linear layer but the head, in the order of the formula."""
    readers = {r: t for n, t in scales.tensors.items() for r in [n, *t.shared_with]}
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or transposed) or "head" in name or "decoder" in name:
            continue
        weight = module.weight.detach().T if transposed else module.weight.detach()
        tensor = readers[f"{name}:weight"]
        scale, zero = torch.tensor(tensor.scale).unsqueeze(1), torch.tensor(tensor.zero_point).reshape(-1, 1)
        rounded = (torch.clamp(torch.round(weight / scale) + zero, tensor.qmin, tensor.qmax) - zero) * scale
        module.weight = nn.Parameter(rounded.T.contiguous() if transposed else rounded)

        def before(m: nn.Module, args: Any, t: Any = readers[f"{name}:input"]) -> tuple[torch.Tensor]:
            codes = torch.clamp(torch.round(args[0] / torch.tensor(t.scale)) + t.zero_point, t.qmin, t.qmax)
            return ((codes - t.zero_point) * torch.tensor(t.scale),)

        module.register_forward_pre_hook(before)
    return run(model, ids)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert", "tiny_gpt2"])
def test_static_w8a8_equals_the_formula_by_hand(name: str, symmetric: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    opened, scales, ids = opened_with_scales(folder, symmetric=symmetric)
    with QuantizedModel(opened.model, plan_from_scales(opened.model, scales)) as quantized:
        ours = run(opened.model, ids)
    assert quantized.silent() == []
    assert torch.equal(ours, by_hand(open_model(folder, device="cpu", dtype="float32").model, scales, ids))


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert", "tiny_gpt2"])
def test_everything_is_as_before_also_after_an_exception(name: str, fail: bool, request: pytest.FixtureRequest) -> None:
    opened, scales, ids = opened_with_scales(request.getfixturevalue(name))
    model = opened.model
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)}
    plain, hooked = run(model, ids), hooks(model)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    plan = plan_from_scales(model, scales, kv_cache="static", skip_positions=1)
    if fail:
        with pytest.raises(IndexError), QuantizedModel(model, plan):
            run(model, ids + 10**6)  # no such token: raised in the middle of the pass
    else:
        with QuantizedModel(model, plan):
            assert not torch.equal(run(model, ids), plain)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[n] is p and torch.equal(p, values) for n, (p, values) in before.items())
    assert hooks(model) == hooked
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert torch.equal(run(model, ids), plain)


def test_an_entry_that_fails_leaves_nothing(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    own = model.model.layers[0].mlp.up_proj.weight
    weights = {
        "model.layers.0.mlp.up_proj": WeightScheme(IntegerGrid.of(8)),
        "model.layers.0.mlp.down_proj": WeightScheme(IntegerGrid.of(4), "per-group", 48),
    }
    hooked = hooks(model)
    with pytest.raises(UsageError, match="groups of 48"), QuantizedModel(model, QuantizationPlan(weights=weights)):
        pass
    assert model.model.layers[0].mlp.up_proj.weight is own
    assert hooks(model) == hooked


def test_an_embedding_tied_to_a_quantized_head_stays(tiny_llama: Path) -> None:
    opened, scales, ids = opened_with_scales(tiny_llama)
    model = opened.model
    embedding = model.get_input_embeddings().weight.detach().clone()
    plan = plan_from_scales(model, scales, include_head=True)
    with QuantizedModel(model, plan):
        run(model, ids)
        assert "lm_head" in plan.weights
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not torch.equal(model.lm_head.weight, embedding)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert plan_from_scales(model, scales).left_out["lm_head"] == "the output head stays in floating point"


def test_the_first_positions_stay_in_float(tiny_llama: Path) -> None:
    """With causal attention the first n tokens depend on nothing that is rounded."""
    opened, _, ids = opened_with_scales(tiny_llama)
    model = opened.model
    plain = run(model, ids)
    plan = plan_from_scales(model, inputs="dynamic-per-token", weights=None, kv_cache="dynamic-per-token", bits=4)
    with QuantizedModel(model, plan):
        rounded = run(model, ids)
    assert not torch.equal(rounded[:, :3], plain[:, :3])
    with QuantizedModel(
        model,
        plan_from_scales(
            model, inputs="dynamic-per-token", weights=None, kv_cache="dynamic-per-token", bits=4, skip_positions=3
        ),
    ):
        skipped = run(model, ids)
    assert torch.equal(skipped[:, :3], plain[:, :3])
    assert not torch.equal(skipped[:, 3:], plain[:, 3:])


@pytest.mark.parametrize("mode", ["fake", "int8"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_first_positions_are_what_the_float_model_has_in_its_cache(
    name: str, mode: str, request: pytest.FixtureRequest
) -> None:
    """Weights too: a prefix in front equals its keys and values, computed by the float model, in the cache."""
    model = open_model(request.getfixturevalue(name), device="cpu", dtype="float32").model
    ids = torch.arange(12).reshape(1, 12) + 20
    plan = plan_from_scales(model, inputs="dynamic-per-token", skip_positions=3)
    plain = run(model, ids)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with torch.no_grad(), QuantizedModel(model, plan, mode=mode):
        behind_cache = model(input_ids=ids[:, 3:], past_key_values=cache).logits
        in_front = model(input_ids=ids).logits
    torch.testing.assert_close(in_front[:, :3], plain[:, :3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_front[:, 3:], behind_cache, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(in_front[:, 3:], plain[:, 3:], rtol=1e-3, atol=1e-4)


def test_positions_count_from_the_first_token_in_the_cache(tiny_llama: Path) -> None:
    """A generation step by step skips the same positions as one pass over all tokens."""
    model, ids = open_model(tiny_llama, device="cpu").model, torch.arange(12).reshape(1, 12) + 20
    plan = plan_from_scales(
        model, inputs="dynamic-per-token", weights=None, kv_cache="dynamic-per-token", bits=4, skip_positions=3
    )
    with torch.no_grad(), QuantizedModel(model, plan):
        whole = model(input_ids=ids).logits
        start = model(input_ids=ids[:, :2], use_cache=True)
        steps, past = [start.logits], start.past_key_values
        for i in range(2, 12):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_tensor_read_by_three_modules_is_rounded_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, scales, ids = opened_with_scales(tiny_llama)
    calls = []
    original = StaticQuantizer.__call__
    monkeypatch.setattr(StaticQuantizer, "__call__", lambda self, x: calls.append(1) or original(self, x))
    with QuantizedModel(opened.model, plan_from_scales(opened.model, scales)):
        run(opened.model, ids)
    assert len(calls) == 3 * 4  # of 7 linear layers: q/k/v share one input, gate/up another


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.shared(x))


def test_a_shared_layer_has_a_scale_for_each_call() -> None:
    model, x = Twice(), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    grid = IntegerGrid.of(8)
    plan = QuantizationPlan(
        inputs={
            "shared#0": StaticQuantizer(grid, torch.tensor(0.5)),
            "shared#1": StaticQuantizer(grid, torch.tensor(0.125)),
        }
    )
    weight = model.shared.weight.detach()
    inner = (x / 0.5).round() * 0.5 @ weight.T
    expected = (inner / 0.125).round() * 0.125 @ weight.T
    with torch.no_grad(), QuantizedModel(model, plan):
        for _ in range(2):  # the second pass counts its calls anew
            assert torch.equal(model(x), expected)


def test_shared_albert_layers_are_planned_by_call(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel, AutoTokenizer

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=300,
        hidden_size=32,
        embedding_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    AlbertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    opened, scales, ids = opened_with_scales(tmp_path)
    plan = plan_from_scales(opened.model, scales, weights=None)
    shared = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    readers = {r: t for n, t in scales.tensors.items() for r in [n, *t.shared_with]}
    steps = [readers[f"{shared}:input#{i}"].scale for i in range(3)]
    assert len(set(steps)) == 3
    seen: list[torch.Tensor] = []
    with QuantizedModel(opened.model, plan) as quantized:
        watch = opened.model.get_submodule(shared).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        run(opened.model, ids)
        run(opened.model, ids)
        watch.remove()
    assert quantized.silent() == []
    for x, step in zip(seen, steps * 2, strict=True):
        codes = x / torch.tensor(step)
        assert torch.equal(codes.round() * torch.tensor(step), x)


def test_convolutions_have_scales_per_output_channel_and_per_tensor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, groups=2))
    x = torch.randn(2, 3, 9, 9)
    plan = plan_from_scales(model, inputs="dynamic-per-token")
    assert plan.inputs["0"] == DynamicQuantizer(IntegerGrid.of(8), "per-tensor")
    weights = [model[i].weight.detach() for i in (0, 2)]
    rounded = []
    for weight in weights:
        scale = weight.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) / 127
        rounded.append((weight / scale).round() * scale)
    with torch.no_grad():
        with QuantizedModel(model, plan):
            found = model(x)
        step = x.abs().max() / 127
        h = torch.relu(nn.functional.conv2d((x / step).round() * step, rounded[0], model[0].bias))
        step = h.abs().max() / 127
        expected = nn.functional.conv2d((h / step).round() * step, rounded[1], model[2].bias, groups=2)
    assert torch.equal(found, expected)


def test_training_rounds_in_each_pass_and_reaches_the_models_own_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    x = torch.randn(16, 8)
    plan = plan_from_scales(model, inputs="dynamic-per-token", bits=4)
    with torch.no_grad(), QuantizedModel(model, plan):
        fixed = model(x)
    parameters = list(model.parameters())
    with QuantizedModel(model, plan, trainable=True):
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        first = model(x)
        assert torch.equal(first, fixed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
            optimizer.step()
        assert model(x).square().mean() < 0.5 * first.square().mean()
    assert "weight" not in vars(model[0])


def test_outputs_are_rounded_too() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(3, 4)
    plan = QuantizationPlan(outputs={"1": StaticQuantizer(IntegerGrid.of(8), torch.tensor(0.25))})
    with torch.no_grad():
        expected = (model(x) / 0.25).round() * 0.25
        with QuantizedModel(model, plan) as quantized:
            assert quantized.silent() == ["1"]
            assert torch.equal(model(x), expected)
            assert quantized.silent() == []
    lstm = nn.LSTM(4, 4)
    with (
        QuantizedModel(lstm, QuantizationPlan(outputs={"": plan.outputs["1"]})),
        pytest.raises(UsageError, match="its output is no tensor"),
    ):
        lstm(x)


def test_tensors_given_by_name_are_rounded() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(input=x)

    model, x = Named(), torch.randn(3, 4)
    plan = plan_from_scales(model, inputs="dynamic-per-token", bits=4)
    with torch.no_grad():
        with QuantizedModel(model, plan):
            fake = model(x)
        with QuantizedModel(model, plan, mode="int8"):
            torch.testing.assert_close(model(x), fake)
        assert not torch.allclose(model(x), fake, rtol=1e-3)


def test_rows_of_flattened_tokens_skip_positions_too() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.embedding(input_ids).flatten(0, 1)).unflatten(0, input_ids.shape)

    model, ids = Flat(), torch.arange(8).reshape(2, 4)
    plan = plan_from_scales(model, inputs="dynamic-per-token", weights=None, bits=4, skip_positions=2)
    with torch.no_grad():
        plain = model(input_ids=ids)
        with QuantizedModel(model, plan):
            rounded = model(ids)
    assert torch.equal(rounded[:, :2], plain[:, :2])
    assert (rounded[:, 2:] != plain[:, 2:]).any(-1).all()
