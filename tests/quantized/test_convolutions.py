# SPDX-License-Identifier: Apache-2.0
"""Error compensation for convolutions."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from torch import nn

from calib.errors import GateError, UsageError
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, QuantizedWeight, WeightScheme
from calib.quantized.convolutions import collect_patch_hessians, compensated_convolutions
from calib.quantized.rounding import gptq
from calib.quantized.weights import as_matrix

FOUR_BITS = WeightScheme(IntegerGrid.of(4))


class OwnPadding(nn.Conv2d):
    """Pads by itself, as ports of TensorFlow models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(
            nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(6, 8, 1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, stride=2),
    "grouped": lambda: nn.Conv2d(6, 8, (1, 3), groups=2, dilation=2, bias=False),
    "mirrored": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "own": lambda: OwnPadding(6, 8, 3),
}
DRAWS = 20


def convolution(kind: str, seed: int = 0) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CONVOLUTIONS[kind]()


def images() -> torch.Tensor:
    mixed = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))  # channels that depend on each other
    noise = torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(0))
    return torch.einsum("bchw,cd->bdhw", noise.cumsum(-1).cumsum(-2) / 8, mixed)


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_a_hessian_gives_the_output_error_of_any_change_of_the_weight(kind: str) -> None:
    layer, x = convolution(kind), images()
    with collect_patch_hessians(layer, [""]) as hessians:
        layer(x[:2])
        layer(x[2:])
    change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = layer(x)
        layer.weight += change
        error = (layer(x) - before).square().sum()
        layer.weight -= change
    rows = change.flatten(1).unflatten(0, (layer.groups, -1))
    expected = torch.einsum("gri,gij,grj->", rows, hessians[""], rows)
    assert expected.item() == pytest.approx(error.item(), rel=1e-3)


def output_errors(layer: nn.Conv2d) -> tuple[float, float]:
    """Squared error of the output with 4-bit weights, compensated and rounded to the nearest."""
    model, x = nn.Sequential(layer), images()
    plan = QuantizationPlan(weights={"0": FOUR_BITS})
    with collect_patch_hessians(model, ["0"]) as hessians:
        model(x)
    errors = []
    for one in (compensated_convolutions(plan, model, hessians), plan):
        with torch.no_grad():
            exact = model(x)
            with QuantizedModel(model, one):
                errors.append((model(x) - exact).square().sum().item())
    return errors[0], errors[1]


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_compensation_lowers_the_output_error_on_average(kind: str) -> None:
    """On average over layers only: columns are rounded greedily, a layer of few inputs can come out worse."""
    pairs = [output_errors(convolution(kind, seed)) for seed in range(DRAWS)]
    assert mean(compensated / nearest for compensated, nearest in pairs) < 0.8


def test_one_group_is_gptq_of_the_weight_as_a_matrix() -> None:
    layer = convolution("plain")
    with collect_patch_hessians(layer, [""]) as hessians:
        layer(images())
    for scheme in (FOUR_BITS, WeightScheme(IntegerGrid.of(4, symmetric=False), "per-tensor")):
        plan = compensated_convolutions(QuantizationPlan(weights={"": scheme}), layer, hessians, order="activation")
        found = plan.weights[""]
        expected = gptq(as_matrix(layer, layer.weight.detach()), hessians[""][0], scheme, order="activation")
        assert isinstance(found, QuantizedWeight)
        torch.testing.assert_close(found.codes, expected.codes, rtol=0, atol=0)
        torch.testing.assert_close(found.dequantize(), expected.dequantize(), rtol=0, atol=0)


def test_groups_share_a_scale_of_the_whole_weight() -> None:
    layer = convolution("depthwise")
    with collect_patch_hessians(layer, [""]) as hessians:
        layer(images())
    scheme = WeightScheme(IntegerGrid.of(8), "per-tensor")
    found = compensated_convolutions(QuantizationPlan(weights={"": scheme}), layer, hessians).weights[""]
    assert isinstance(found, QuantizedWeight)
    assert found.scale.shape == (1, 1)
    assert found.scale.item() == pytest.approx(layer.weight.abs().max().item() / 127, rel=1e-6)
    with QuantizedModel(layer, QuantizationPlan(weights={"": found})):
        assert layer.weight.shape == (6, 1, 3, 3)


def test_what_is_no_convolution_and_what_was_not_reached_are_refused() -> None:
    with pytest.raises(UsageError, match="a Linear"), collect_patch_hessians(nn.Linear(2, 2), [""]):
        pass
    with pytest.raises(UsageError, match="nowhere: is no module"), collect_patch_hessians(nn.Linear(2, 2), ["nowhere"]):
        pass
    same = nn.Conv2d(2, 2, 3, padding="same")
    with pytest.raises(UsageError, match="'same'"), collect_patch_hessians(same, [""]):
        same(torch.ones(1, 2, 4, 4))
    with pytest.raises(GateError, match="no convolution was reached"):
        compensated_convolutions(QuantizationPlan(), same, {})
    layer = convolution("plain")
    with pytest.raises(UsageError, match="no scheme"):
        compensated_convolutions(QuantizationPlan(), layer, {"": torch.eye(54)[None]})
