# SPDX-License-Identifier: Apache-2.0
"""Errors of tensors: isolated, running and expected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.corpus import build_blocks
from calib.errors import GateError, UsageError
from calib.evaluation.layers import layer_errors
from calib.measurement.engine import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import IntegerGrid, QuantizationPlan, WeightScheme, plan_from_scales
from calib.quantized.quantizers import DynamicQuantizer, StaticQuantizer
from calib.quantized.weights import as_matrix
from calib.scales import choose_scales

GRID = IntegerGrid.of(8)


def static(scale: float, bits: int = 8) -> StaticQuantizer:
    return StaticQuantizer(IntegerGrid.of(bits), torch.tensor(scale))


def by_hand(x: torch.Tensor, scale: float, limit: int = 127) -> torch.Tensor:
    return torch.clamp(torch.round(x / scale), -limit, limit) * scale


def sqnr(exact: torch.Tensor, other: torch.Tensor) -> float:
    x, y = exact.double(), other.double()
    return 10 * math.log10(float((x**2).sum() / ((x - y) ** 2).sum()))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    opened = open_model(tiny_llama, device="cpu", dtype="float32")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=8, max_length=32)
    measurement = measure(opened, blocks, MeasureOptions())
    rows = [{"input_ids": torch.from_numpy(row[None])} for row in blocks.input_ids]
    return opened.model, measurement, rows


@pytest.fixture
def two_layers() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    return model, torch.randn(3, 5, 16)


def test_both_errors_are_those_of_an_emulation(two_layers: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = two_layers
    plan = QuantizationPlan(inputs={"0": static(0.05, 4), "2": static(0.01)}, weights={"0": WeightScheme(GRID)})
    found = layer_errors(model, [x[:1], x[1:]], plan).tensors
    with torch.no_grad():
        first, hidden = by_hand(x, 0.05, 7), torch.tanh(model[0](x))
        steps = model[0].weight.abs().amax(1, keepdim=True) / 127
        weight = torch.clamp(torch.round(model[0].weight / steps), -127, 127) * steps
        output = nn.functional.linear(first, weight, model[0].bias)
        running = by_hand(torch.tanh(output), 0.01)
        result = nn.functional.linear(running, model[2].weight, model[2].bias)
    isolated = {"0:weight": (model[0].weight.detach(), weight), "0:input": (x, first)}
    isolated["2:input"] = (hidden, by_hand(hidden, 0.01))
    for name, (exact, other) in isolated.items():
        error = found[name].isolated
        assert error is not None
        assert error.sqnr_db == pytest.approx(sqnr(exact, other), abs=1e-3)
        assert error.rel_mae == pytest.approx(float((exact - other).abs().sum() / exact.abs().sum()), rel=1e-4)
        assert error.zeroed == pytest.approx(float(((exact != 0) & (other == 0)).double().mean()))
        assert error.values == exact.numel()
    with torch.no_grad():
        pairs = {"0:input": (x, first), "0:output": (model[0](x), output), "2:input": (hidden, running)}
        pairs["2:output"] = (model(x), result)
    for name, (exact, other) in pairs.items():
        error = found[name].running
        assert error is not None
        assert error.sqnr_db == pytest.approx(sqnr(exact, other), abs=1e-2)
    assert list(found) == ["0:weight", "0:input", "2:input", "0:output", "2:output"]
    assert found["0:output"].isolated is None
    assert found["0:weight"].running is None


def test_an_error_of_a_layer_before_shows_in_the_running_error_only(
    two_layers: tuple[nn.Module, torch.Tensor],
) -> None:
    model, x = two_layers
    plan = QuantizationPlan(inputs={"2": static(1 / 127)}, weights={"0": WeightScheme(IntegerGrid.of(2))})
    tensor = layer_errors(model, [x], plan).tensors["2:input"]
    assert tensor.isolated is not None
    assert tensor.running is not None
    assert tensor.isolated.sqnr_db is not None
    assert tensor.running.sqnr_db is not None
    assert tensor.isolated.sqnr_db > 40
    assert tensor.running.sqnr_db < 15


def test_on_its_own_data_a_tensor_has_the_error_that_its_scale_file_expects(llama: Any) -> None:
    model, measurement, rows = llama
    for options in ({}, {"symmetric": False}, {"bits": 4}):
        scales = choose_scales(measurement, **options)
        plan = plan_from_scales(model, scales, kv_cache="static")
        found = layer_errors(model, rows, plan, scales=scales)
        compared = [t for t in found.tensors.values() if t.difference_db is not None]
        assert len(compared) == 7 * 3 + 4 * 3 + 2 * 3  # weights, distinct inputs, keys and values
        assert found.median_difference_db is not None
        assert found.median_difference_db < 0.1
        assert found.disagreements() == []


def test_a_scale_file_that_expects_something_else_is_told(llama: Any) -> None:
    model, measurement, rows = llama
    scales = choose_scales(measurement)
    name = "model.layers.1.mlp.down_proj:input"
    tensor = scales.tensors[name]
    assert tensor.expected.sqnr_db is not None
    wrong = tensor.expected.model_copy(update={"sqnr_db": tensor.expected.sqnr_db + 3})
    scales = scales.model_copy(
        update={"tensors": {**scales.tensors, name: tensor.model_copy(update={"expected": wrong})}}
    )
    found = layer_errors(model, rows, plan_from_scales(model, scales), scales=scales)
    assert [t.name for t in found.disagreements()] == [name]
    assert found.tensors[name].difference_db == pytest.approx(-3, abs=0.1)


def test_a_tensor_with_several_readers_counts_once(llama: Any) -> None:
    model, measurement, rows = llama
    scales = choose_scales(measurement)
    found = layer_errors(model, rows[:1], plan_from_scales(model, scales), scales=scales)
    inputs = [name for name in found.tensors if name.endswith(":input")]
    assert len(inputs) == 4 * 3
    values = found.tensors["model.layers.0.self_attn.q_proj:input"].running
    assert values is not None
    assert values.values == 32 * 64


def test_what_a_plan_does_not_take_from_the_file_has_no_expected_error(llama: Any) -> None:
    model, measurement, rows = llama
    scales = choose_scales(measurement)
    plan = plan_from_scales(model, scales, inputs="dynamic-per-token", weights=WeightScheme(IntegerGrid.of(4)))
    assert all(t.expected is None for t in layer_errors(model, rows[:1], plan, scales=scales).tensors.values())


def test_weights_only_shows_what_arrives_at_each_layer(llama: Any) -> None:
    model, measurement, rows = llama
    scales = choose_scales(measurement)
    found = layer_errors(model, rows[:2], plan_from_scales(model, scales, inputs="none"), scales=scales).tensors
    first, last = (found[f"model.layers.{i}.{n}:input"] for i, n in ((0, "self_attn.q_proj"), (2, "mlp.down_proj")))
    assert first.isolated is None
    assert first.running is not None
    assert last.running is not None
    assert first.running.sqnr_db is None  # nothing was rounded before it
    assert last.running.sqnr_db is not None


def test_keys_and_values_are_seen_as_attention_reads_them(llama: Any) -> None:
    model, _, rows = llama
    plan = plan_from_scales(model, inputs="none", weights=None, kv_cache="dynamic-per-token", kv_bits=4)
    found = layer_errors(model, rows[:2], plan).tensors
    first = found["model.layers.0.self_attn:key"]
    assert first.isolated is not None
    assert first.running == first.isolated
    second = found["model.layers.1.self_attn:key"]
    assert second.isolated is not None
    assert second.running is not None
    assert second.running.sqnr_db < second.isolated.sqnr_db


def test_positions_in_float_do_not_count(llama: Any) -> None:
    model, _, rows = llama
    plan = plan_from_scales(model, inputs="dynamic-per-token", skip_positions=4)
    found = layer_errors(model, rows[:1], plan).tensors["model.layers.0.mlp.down_proj:input"]
    assert found.isolated is not None
    assert found.isolated.values == 28 * 128


def test_calls_of_a_shared_layer_are_told_apart() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(100 * self.layer(x))

    x = torch.randn(2, 3, 8)
    plan = QuantizationPlan(inputs={"layer#0": static(0.03), "layer#1": static(3.0)})
    found = layer_errors(Twice(), [x, x], plan).tensors
    with torch.no_grad():
        second = 100 * layer(x)
    assert found["layer:input#0"].isolated.sqnr_db == pytest.approx(sqnr(x, by_hand(x, 0.03)), abs=1e-3)
    assert found["layer:input#1"].isolated.sqnr_db == pytest.approx(sqnr(second, by_hand(second, 3.0)), abs=1e-3)


def test_worst_tensors_come_in_order(llama: Any) -> None:
    model, _, rows = llama
    found = layer_errors(model, rows[:2], plan_from_scales(model, inputs="dynamic-per-token", bits=4))
    figures = [t.running.sqnr_db for t in found.worst(5) if t.running is not None]
    assert figures == sorted(figures)
    assert figures[0] == min(t.running.sqnr_db for t in found.tensors.values() if t.running and t.running.sqnr_db)


def test_the_model_is_left_as_it_was_also_after_an_error(llama: Any) -> None:
    model, _, rows = llama
    before = dict(model.named_parameters())
    plan = plan_from_scales(model, inputs="dynamic-per-token")
    layer_errors(model, rows[:1], plan)
    with pytest.raises(ValueError, match="input_ids"):
        layer_errors(model, [{"nonsense": 1}], plan)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_nan_is_refused_with_the_name_of_the_tensor(two_layers: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = two_layers
    x[0, 0, 0] = torch.nan
    with pytest.raises(GateError, match="0:input: NaN"):
        layer_errors(model, [x], QuantizationPlan(inputs={"0": DynamicQuantizer(GRID)}))


def test_no_batch_is_refused(two_layers: tuple[nn.Module, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="no batch"):
        layer_errors(two_layers[0], [], QuantizationPlan(inputs={"0": DynamicQuantizer(GRID)}))


def test_convolutions_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, groups=4))
    found = layer_errors(model, [torch.randn(2, 3, 9, 9)], plan_from_scales(model, inputs="dynamic-per-token"))
    assert set(found.tensors) == {f"{n}:{p}" for n in "02" for p in ("weight", "input", "output")}
    error = found.tensors["0:weight"].isolated
    assert error is not None
    assert error.values == as_matrix(model[0], model[0].weight).numel()
    # the output is kept before ReLU writes into it
    with torch.no_grad():
        assert (model[0](torch.zeros(1, 3, 9, 9)) < 0).any()
    running = found.tensors["0:output"].running
    assert running is not None
    assert np.isfinite(running.sqnr_db)
