# SPDX-License-Identifier: Apache-2.0
"""True INT8 execution: the codes of fake quantization, multiplied exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calib.corpus import build_blocks
from calib.errors import UsageError
from calib.measurement.engine import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.int8 import Int8Input, int8_matmul
from calib.quantized.quantizers import DynamicQuantizer, Float8Quantizer, IntegerQuantizer, StaticQuantizer
from calib.quantized.rounding import round_to_nearest
from calib.scales import choose_scales

GRID = IntegerGrid.of(8)
ASYMMETRIC = IntegerGrid.of(8, symmetric=False)
QUANTIZERS = [
    StaticQuantizer(GRID, torch.tensor(0.02)),
    StaticQuantizer(ASYMMETRIC, torch.tensor(0.015), torch.tensor(-37.0)),
    DynamicQuantizer(GRID),
    DynamicQuantizer(ASYMMETRIC),
    DynamicQuantizer(GRID, "per-tensor"),
    DynamicQuantizer(IntegerGrid.of(4)),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 8), (17, 16, 24), (3, 65, 7), (40, 1000, 33), (0, 5, 6)])
def test_the_product_is_exact(shape: tuple[int, int, int], pad: bool) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    assert torch.equal(int8_matmul(a, b, pad=pad), (a.long() @ b.long().T).int())


def test_extreme_codes_do_not_saturate_inside_the_product() -> None:
    a, b = (torch.full((32, 1024), value, dtype=torch.int8) for value in (-128, -128))
    assert (int8_matmul(a, b) == 1024 * 128 * 128).all()
    assert (int8_matmul(a, -b - 1) == -1024 * 128 * 127).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_stand_for_the_values_of_fake_quantization(quantizer: IntegerQuantizer) -> None:
    x = random(3, 5, 32)
    codes = Int8Input.of(x, quantizer)
    point = 0 if codes.zero_point is None else codes.zero_point
    assert codes.codes.dtype == torch.int8
    assert torch.equal((codes.codes.int() - point).float() * codes.scale, quantizer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_outputs_differ_by_the_rounding_of_float32_at_most(quantizer: Any, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40, bias=bias), random(4, 9, 96)
    plan = QuantizationPlan(inputs={"": quantizer}, weights={"": WeightScheme(GRID)})
    with torch.no_grad():
        with QuantizedModel(layer, plan):
            fake, weight = layer(x), layer.weight.detach().clone()
        with QuantizedModel(layer, plan, mode="int8") as quantized:
            exact = layer(x)
            assert torch.equal(layer.weight, weight)
        assert quantized.not_int8 == {}
        assert quantized.silent() == []
    size = quantizer(x).abs() @ weight.abs().T + (layer.bias.abs() if bias else 0)
    assert ((fake - exact).abs() <= (96 + 8) * 2.0**-24 * size).all()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
@pytest.mark.parametrize("inputs", ["static", "dynamic-per-token"])
def test_whole_models_agree_in_both_modes(name: str, inputs: Any, request: pytest.FixtureRequest) -> None:
    opened = open_model(request.getfixturevalue(name), device="cpu", dtype="float32")
    model = opened.model
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=32)
    scales = choose_scales(measure(opened, blocks, MeasureOptions()), symmetric=False)
    ids = torch.from_numpy(blocks.input_ids)
    plan = plan_from_scales(model, scales, inputs=inputs)
    keys = [n for n in plan.weights if n in plan.inputs]
    seen: dict[str, list[torch.Tensor]] = {}

    def logits(mode: Any) -> torch.Tensor:
        with torch.no_grad(), QuantizedModel(model, plan, mode=mode) as quantized:
            handle = model.get_submodule(keys[0]).register_forward_hook(
                lambda m, args, y: seen.setdefault(mode, []).append(y)
            )
            result = model(input_ids=ids)[0]
            handle.remove()
        assert quantized.not_int8 == {}
        assert quantized.silent() == []
        return result

    fake, exact = logits("fake"), logits("int8")
    torch.testing.assert_close(seen["int8"][0], seen["fake"][0], rtol=1e-5, atol=1e-6)
    # a difference in the last bit may move a later code by one
    torch.testing.assert_close(exact, fake, rtol=0.02, atol=0.02 * float(fake.abs().max()))


def test_a_tensor_read_by_three_modules_is_coded_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny_llama, device="cpu", dtype="float32").model
    calls = []
    original = Int8Input.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Int8Input, "of", classmethod(lambda cls, x, q: calls.append(1) or original(cls, x, q)))
    plan = plan_from_scales(model, inputs="dynamic-per-token")
    # one quantizer for all: what tells tensors apart is the tensor
    quantizer = plan.inputs["model.layers.0.mlp.up_proj"]
    plan = QuantizationPlan(inputs=dict.fromkeys(plan.inputs, quantizer), weights=plan.weights)
    with torch.no_grad(), QuantizedModel(model, plan, mode="int8"):
        model(input_ids=torch.arange(8).reshape(1, 8))
    assert len(calls) == 3 * 4


def test_first_positions_in_float_are_the_same_in_both_modes(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu", dtype="float32").model
    ids = torch.arange(24).reshape(2, 12) + 20
    plan = plan_from_scales(model, inputs="dynamic-per-token", skip_positions=2)
    with torch.no_grad():
        with QuantizedModel(model, plan):
            fake = model(input_ids=ids).logits
        with QuantizedModel(model, plan, mode="int8"):
            exact = model(input_ids=ids).logits
    torch.testing.assert_close(exact[:, :2], fake[:, :2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact, fake, rtol=0.02, atol=0.02 * float(fake.abs().max()))


def test_weights_rounded_before_are_multiplied_as_they_are() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), random(5, 16)
    codes = round_to_nearest(layer.weight.detach(), WeightScheme(IntegerGrid.of(4)))
    groups = round_to_nearest(layer.weight.detach(), WeightScheme(IntegerGrid.of(4), "per-group", 8))
    plan = QuantizationPlan(inputs={"": DynamicQuantizer(GRID)}, weights={"": codes})
    with torch.no_grad():
        with QuantizedModel(layer, plan):
            fake = layer(x)
        with QuantizedModel(layer, plan, mode="int8") as quantized:
            torch.testing.assert_close(layer(x), fake)
        assert quantized.not_int8 == {}
    assert "per group" in QuantizedModel(layer, plan.with_weights({"": groups}), mode="int8").not_int8[""]


def test_what_cannot_be_computed_in_int8_is_named_and_stays_fake() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {name: nn.Linear(16, 16) for name in ("group", "weight_only", "float8", "per_channel", "asymmetric", "wide")}
    )
    model["conv"] = nn.Conv1d(4, 4, 3)
    dynamic, row = DynamicQuantizer(GRID), WeightScheme(GRID)
    plan = QuantizationPlan(
        inputs={
            "group": dynamic,
            "float8": Float8Quantizer(),
            "per_channel": StaticQuantizer(GRID, torch.full([16], 0.02)),
            "asymmetric": dynamic,
            "wide": DynamicQuantizer(IntegerGrid.of(16)),
            "conv": DynamicQuantizer(GRID, "per-tensor"),
        },
        weights={
            "group": WeightScheme(IntegerGrid.of(4), "per-group", 8),
            "weight_only": row,
            "float8": WeightScheme(None),
            "per_channel": row,
            "asymmetric": WeightScheme(ASYMMETRIC),
            "wide": row,
            "conv": row,
        },
    )
    quantized = QuantizedModel(model, plan, mode="int8")
    assert set(quantized.not_int8) == set(plan.weights)
    x = random(3, 16)
    for name in list(plan.weights)[:-1]:
        with torch.no_grad(), QuantizedModel(model, plan):
            fake = model[name](x)
        with torch.no_grad(), quantized:
            assert torch.equal(model[name](x), fake)


def test_impossible_modes_are_refused() -> None:
    plan = QuantizationPlan(weights={"": WeightScheme(GRID)})
    with pytest.raises(UsageError, match="unknown"):
        QuantizedModel(nn.Linear(2, 2), plan, mode="other")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no gradient"):
        QuantizedModel(nn.Linear(2, 2), plan, mode="int8", trainable=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_products_on_cuda_equal_those_on_the_cpu(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(70, 33, bias=False).to(dtype), random(5, 70).to(dtype)
    for quantizer in QUANTIZERS:
        here, there = (Int8Input.of(x.to(d), quantizer.to(torch.device(d))) for d in ("cpu", "cuda"))
        assert torch.equal(here.codes, there.codes.cpu())
        plan = QuantizationPlan(inputs={"": quantizer}, weights={"": WeightScheme(GRID)})
        outputs = []
        for device in ("cpu", "cuda"):
            with torch.no_grad(), QuantizedModel(layer.to(device), plan, mode="int8"):
                outputs.append(layer(x.to(device)).cpu())
        assert torch.equal(*outputs)
