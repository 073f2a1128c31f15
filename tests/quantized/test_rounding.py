# SPDX-License-Identifier: Apache-2.0
"""Rounding of weights: to the nearest, and with error compensation against an independent reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.errors import GateError, UsageError
from calib.models import open_model
from calib.quantized import IntegerGrid, QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.hessian import collect_hessians, compensated, hessian_bytes
from calib.quantized.rounding import gptq, round_to_nearest
from calib.quantized.weights import as_matrix

SCHEMES = [
    WeightScheme(IntegerGrid.of(4)),
    WeightScheme(IntegerGrid.of(3), "per-tensor"),
    WeightScheme(IntegerGrid.of(4, symmetric=False), "per-group", 8),
    WeightScheme(IntegerGrid.of(8, convention="compressed-tensors")),
]


def problem(outputs: int = 12, inputs: int = 32, rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the mean of x x^T of inputs that are correlated, as those of real layers are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) * rng.lognormal(size=inputs)
    return torch.from_numpy(rng.normal(size=(outputs, inputs))).float(), torch.from_numpy(x.T @ x / rows).float()


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (weight - rounded).double()
    return float(torch.trace(error @ hessian.double() @ error.T))


def optimal_brain_quantizer(weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """Column by column with an explicit inverse of what is left (Frantar and Alistarh 2022, eq. 3), in float64."""
    assert scheme.grid is not None
    grid = scheme.grid
    grouped = scheme.grouped(torch.from_numpy(weight).float())
    scale, point = scheme.step(grouped)
    scales = scale.expand(grouped.shape).flatten(1).double().numpy()
    points = np.zeros_like(scales) if point is None else point.expand(grouped.shape).flatten(1).double().numpy()
    scales, points = np.broadcast_to(scales, weight.shape), np.broadcast_to(points, weight.shape)
    hessian = hessian + np.eye(len(hessian)) * 0.01 * np.diag(hessian).mean()
    left, codes = weight.copy(), np.zeros_like(weight)
    for i in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[i:, i:])
        codes[:, i] = np.clip(np.rint(left[:, i] / scales[:, i]) + points[:, i], grid.qmin, grid.qmax)
        error = left[:, i] - (codes[:, i] - points[:, i]) * scales[:, i]
        left[:, i:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("block_size", [1, 7, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_equals_the_reference_that_inverts_in_each_step(scheme: WeightScheme, block_size: int) -> None:
    weight, hessian = problem()
    found = gptq(weight, hessian, scheme, block_size=block_size)
    expected = optimal_brain_quantizer(weight.double().numpy(), hessian.double().numpy(), scheme)
    assert np.array_equal(found.codes.numpy(), expected)


@pytest.mark.parametrize("order", ["fixed", "activation"])
@pytest.mark.parametrize("scheme", [*SCHEMES, WeightScheme(None)])
def test_gptq_loses_less_of_the_output_than_rounding_to_the_nearest(scheme: WeightScheme, order: Any) -> None:
    weight, hessian = problem()
    nearest, better = round_to_nearest(weight, scheme), gptq(weight, hessian, scheme, order=order)
    errors = [output_error(weight, q.dequantize(), hessian) for q in (nearest, better)]
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(nearest.scale, better.scale)
    assert better.codes.dtype == nearest.codes.dtype


def test_activation_order_is_the_fixed_order_of_sorted_columns() -> None:
    weight, hessian = problem()
    scheme = SCHEMES[0]
    columns = torch.argsort(hessian.diagonal(), descending=True)
    found = gptq(weight, hessian, scheme, order="activation")
    by_hand = gptq(weight[:, columns], hessian[columns][:, columns], scheme)
    assert torch.equal(found.codes[:, columns], by_hand.codes)


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight, _ = problem()
    found = gptq(weight, torch.diag(torch.arange(1.0, 33.0)), SCHEMES[0])
    assert torch.equal(found.codes, round_to_nearest(weight, SCHEMES[0]).codes)


def test_inputs_that_were_always_zero_are_rounded_to_the_nearest() -> None:
    weight, hessian = problem()
    hessian[:, 5] = hessian[5] = 0
    found = gptq(weight, hessian, SCHEMES[0])
    assert torch.equal(found.codes[:, 5], round_to_nearest(weight, SCHEMES[0]).codes[:, 5])


def test_round_to_nearest_is_half_a_step_off_at_most() -> None:
    weight, _ = problem()
    weight[4] = 0
    for scheme in SCHEMES[:3]:
        found = round_to_nearest(weight, scheme)
        steps = found.scale.repeat_interleave(32 // found.scale.shape[1], 1)
        assert ((found.dequantize() - weight).abs() <= steps * 0.50001).all()
        assert not found.dequantize()[4].any()
        assert torch.equal(found.dequantize(), scheme.fake(weight))


def test_bad_hessians_are_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(UsageError, match="for 32 inputs"):
        gptq(weight, hessian[:8, :8], SCHEMES[0])
    with pytest.raises(UsageError, match="q_proj: its Hessian is not positive definite"):
        gptq(weight, -hessian, SCHEMES[0], name="q_proj")
    with pytest.raises(UsageError, match="order"):
        gptq(weight, hessian, SCHEMES[0], order="other")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group size"):
        WeightScheme(IntegerGrid.of(4), "per-row", 8)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_hessians_are_those_of_the_inputs_that_layers_read(name: str, request: pytest.FixtureRequest) -> None:
    model = open_model(request.getfixturevalue(name), device="cpu", dtype="float32").model
    plan = plan_from_scales(model, inputs="none", bits=4)
    names, seen = list(plan.weights), {n: [] for n in plan.weights}
    ids = torch.arange(120).reshape(2, 60) + 20
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0].double()))
        for n in names
    ]
    with torch.no_grad(), collect_hessians(model, names, skip_positions=3) as hessians:
        model(input_ids=ids)
        model(input_ids=ids + 7)
    for handle in handles:
        handle.remove()
    for n in names:
        rows = torch.cat([x[:, 3:].flatten(0, 1) for x in seen[n]])
        assert hessians[n].rows == len(rows) == 2 * 2 * 57
        torch.testing.assert_close(hessians[n].mean().double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert hessian_bytes(model, names) == sum(h.total.nbytes for h in hessians.values())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_compensated_plan_changes_the_outputs_of_layers_less(name: str, request: pytest.FixtureRequest) -> None:
    model = open_model(request.getfixturevalue(name), device="cpu", dtype="float32").model
    plan = plan_from_scales(model, inputs="none", bits=3)
    ids = torch.arange(240).reshape(4, 60) + 20
    layer = next(iter(plan.weights))
    plan = plan.without({n: "not in this test" for n in plan.weights if n != layer})
    with torch.no_grad(), collect_hessians(model, [layer]) as hessians:
        model(input_ids=ids)
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, y: outputs.append(y))
    with torch.no_grad():
        model(input_ids=ids)
        for chosen in (plan, compensated(plan, model, hessians)):
            with QuantizedModel(model, chosen):
                model(input_ids=ids)
    handle.remove()
    nearest, better = ((y - outputs[0]).square().sum() for y in outputs[1:])
    assert better < 0.9 * nearest


def test_layers_without_a_hessian_are_refused(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    plan = plan_from_scales(model, inputs="none")
    with pytest.raises(UsageError, match="no such module"), collect_hessians(model, ["nothing"]):
        pass
    with pytest.raises(UsageError, match="no linear layer"), collect_hessians(nn.Sequential(nn.ReLU()), ["0"]):
        pass
    with collect_hessians(model, ["model.layers.0.mlp.up_proj", "lm_head"]) as hessians:
        pass
    with pytest.raises(GateError, match="no input was seen"):
        compensated(plan, model, hessians)
    hessians.pop("model.layers.0.mlp.up_proj")
    with pytest.raises(UsageError, match="lm_head: the plan has no scheme"):
        compensated(plan, model, hessians)


def test_the_matrix_of_a_transposed_layer_is_outputs_by_inputs(tiny_gpt2: Path) -> None:
    model = open_model(tiny_gpt2, device="cpu").model
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert as_matrix(layer, layer.weight).shape == (256, 64)
