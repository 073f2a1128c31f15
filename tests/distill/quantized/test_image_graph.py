# SPDX-License-Identifier: Apache-2.0
"""Graphs of image students compute what the student computes, and in integers what the quantized one computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calib.distill.networks import make_network
from calib.distill.quantized.deployment import deploy
from calib.distill.quantized.image_graph import INPUT, integer_image_graph, tensor_graph
from calib.distill.quantized.integer_linear import IntegerLinear
from calib.distill.task import ClassificationTask
from calib.errors import ModelError
from calib.export.linears import LinearRange
from calib.quantized import QuantizedModel, plan_from_scales

pytest.importorskip("onnxruntime")


def computed(graph: Any, folder: Path, x: torch.Tensor) -> torch.Tensor:
    from calib.export.onnx_graph import save_onnx
    from calib.export.onnx_lint import session

    save_onnx(graph, folder / "graph.onnx")
    return torch.from_numpy(session(folder / "graph.onnx").run(None, {INPUT: x.numpy()})[0])


@pytest.mark.parametrize(("network", "shape"), [("vit_micro", (1, 16, 16)), ("mlp64", (32,))])
def test_the_float_graph_computes_what_the_student_does(network: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, x = student(network, shape)
    with torch.no_grad():
        torch.testing.assert_close(computed(tensor_graph(model, x, "m"), tmp_path, x), model(x), rtol=1e-4, atol=1e-5)


def test_the_int8_graph_computes_what_the_quantized_student_does(tmp_path: Path) -> None:
    """A perceptron: through the depth of a transformer one code that falls to the other side moves all that follow."""
    model, x = student("mlp64", (32,))
    batch = (x, torch.arange(len(x)) % 5)
    scales = deploy(model, ClassificationTask(), [batch], [batch]).scales
    with torch.no_grad(), QuantizedModel(model, plan_from_scales(model, scales)):
        rounded = model(x)
    found = computed(integer_image_graph(model, scales, x), tmp_path, x)
    by_rounding = float((rounded - model(x)).detach().square().mean())
    assert by_rounding > 1e-7
    assert float((found - rounded).square().mean()) < 0.01 * by_rounding


def student(network: str, shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_network(network, 5, channels=shape[0], size=shape[-1] if len(shape) > 1 else 1)
        return model.eval(), torch.randn(50, *shape)


def test_an_integer_layer_rounds_input_weight_and_bias_as_its_scales_say() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.5], [0.0, -2.54]]))
        layer.bias.copy_(torch.tensor([0.1, -0.3]))
    wanted = LinearRange("layer", -1.27, 1.27, True)
    integer = IntegerLinear(layer, wanted)
    assert integer.weight_quantized.tolist() == [[127, 50], [0, -127]]
    assert integer.bias_quantized is not None
    assert integer.bias_quantized.tolist() == [1000, -1500]  # steps of 0.01 x 0.01 and 0.01 x 0.02
    x = torch.tensor([[[0.104, -5.0]]])
    expected = torch.tensor([[[0.1 * 1.27 - 1.28 * 0.5 + 0.1, 1.28 * 2.54 - 0.3]]])
    torch.testing.assert_close(integer(x), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_that_no_int32_holds_leaves_its_layer_in_float() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1e-6)
        layer.bias.fill_(1e6)
    with pytest.raises(ModelError, match="bias is too large"):
        IntegerLinear(layer, LinearRange("layer", -1e-3, 1e-3, True))


def test_a_network_of_convolutions_keeps_them_in_float(tmp_path: Path) -> None:
    model, x = student("resnet8", (1, 8, 8))
    batch = (x, torch.arange(len(x)) % 5)
    scales = deploy(model, ClassificationTask(), [batch], [batch]).scales
    from calib.export.onnx_graph import save_onnx
    from calib.export.onnx_lint import integer_layers

    save_onnx(integer_image_graph(model, scales, x), tmp_path / "int8.onnx")
    assert integer_layers(tmp_path / "int8.onnx") == ["fc"]
    del scales.tensors["fc:input"]
    with pytest.raises(ModelError, match="no linear layer"):
        integer_image_graph(model, scales, x)
