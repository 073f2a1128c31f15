# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of models that read one tensor, images or spectra or sound: in float, and with INT8 linear layers."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.quantized.integer_linear import IntegerLinear
from calib.errors import ModelError
from calib.export.linears import linear_ranges
from calib.export.onnx_graph import OPSET
from calib.schema.scales import ScaleFile

__all__ = ["INPUT", "integer_image_graph", "tensor_graph"]

INPUT = "inputs"
"""Name of the one input of a graph."""


def tensor_graph(model: nn.Module, example: Tensor, name: str) -> Any:
    """The float graph, by torch's exporter.

    Args:
        model: takes one tensor; gives logits, or an output of transformers that has them.
        example: float32 `[n, ...]`; n is free in the graph.
        name: of the model, for errors.

    Raises:
        ModelError: torch cannot export it.
    """
    model = copy.deepcopy(model).cpu().eval()
    choose: Any = getattr(model, "set_attn_implementation", None)
    if choose is not None:  # products and a softmax, which runtimes fuse
        choose("eager")
    two = example[:1].expand(2, *example.shape[1:]).cpu()  # a dimension of 1 would be no free one
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                _Logits(model),
                (two,),
                dynamic_shapes=({0: "batch"},),
                input_names=[INPUT],
                output_names=["output"],
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=True,
            )
    except Exception as error:  # whatever the exporter and the model raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name}: torch cannot export it to ONNX ({reason})") from error
    finally:
        logging.disable(level)
    return program.model_proto


def integer_image_graph(model: nn.Module, scales: ScaleFile, example: Tensor) -> Any:
    """The graph whose linear layers compute in INT8. Convolutions stay in float.

    ONNX Runtime has an integer convolution only between two `QuantizeLinear`, which needs a scale for its output too,
    and the scale file has those of inputs alone.

    Args:
        model: the student.
        scales: 8-bit.
        example: as for `tensor_graph`.

    Raises:
        ModelError: no linear layer has a scale, or torch cannot export the model.
    """
    integer = copy.deepcopy(model).cpu().eval()
    made = 0
    for name, wanted in linear_ranges(scales, integer, fused=False).ranges.items():
        layer: Any = integer.get_submodule(name)
        try:
            replacement = IntegerLinear(layer, wanted)
        except ModelError:
            continue  # it stays in float, and is not counted
        parent, _, attribute = name.rpartition(".")
        setattr(integer.get_submodule(parent), attribute, replacement)
        made += 1
    if not made:
        raise ModelError(f"{scales.model.name}: no linear layer of the graph could be quantized")
    return _with_slashes(tensor_graph(integer, example, scales.model.name))


class _Logits(nn.Module):
    """One tensor as output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.model(inputs)
        found: Tensor = getattr(output, "logits", output)
        return found


def _with_slashes(graph: Any) -> Any:
    """Weights named as `calib.export` names them, so that `integer_layers` finds them."""
    new = {
        tensor.name: tensor.name.removeprefix("model.").removesuffix(".weight_quantized") + "/weight_quantized"
        for tensor in graph.graph.initializer
        if tensor.name.endswith(".weight_quantized")
    }
    for tensor in graph.graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for node in graph.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
    return graph
