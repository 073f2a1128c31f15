# SPDX-License-Identifier: Apache-2.0
"""What a Q/DQ graph must compute: single layers in exact integers, the whole model by calib's quantized model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.export.compare import first_output, largest_difference
from calib.export.onnx_graph import reached
from calib.export.read_onnx import QdqGraph, QdqLinear

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = ["float_twin", "layer_model", "layer_outputs", "layer_rows", "onnx_plan", "reference_output", "token_feed"]

_NUDGE = 1e-4
"""Large enough that a few values of the first layer take the next code. Whether the last bit of a float sum does that
is chance; once it has happened, the difference spreads through the layers to the same size (1e-5 and 1e-4 alike)."""


def layer_rows(linear: QdqLinear, rows: int = 4) -> NDArray[np.float32]:
    """Random rows that fill the range of a layer and go beyond it, float32 ``[rows, in]``, the same in every run."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, linear.codes.shape[0])) * (linear.scale * (linear.qmax - linear.qmin) / 4)
    return x.astype(np.float32)


def layer_outputs(linear: QdqLinear, x: NDArray[np.float32], *, saturating: bool = False) -> NDArray[np.float64]:
    """The output of a layer, its product in exact integers, float64 ``[rows, out]``.

    Args:
        linear: the layer.
        x: ``[rows, in]``.
        saturating: as x86 processors without VNNI multiply: inputs moved to 0..255, and the sum of two neighbouring
            products held in 16 bits (`vpmaddubsw`), beyond which it stays at the end.
    """
    codes = np.rint(x / np.float32(linear.scale)) + linear.zero_point
    codes = np.clip(codes, linear.qmin, linear.qmax).astype(np.int64)
    weight = linear.codes.astype(np.int64)
    if saturating:
        unsigned = np.pad(codes - linear.qmin, ((0, 0), (0, len(weight) % 2)))
        padded = np.pad(weight, ((0, len(weight) % 2), (0, 0)))
        total = np.zeros((len(x), weight.shape[1]), np.int64)
        for first in range(0, len(padded), 2):
            pair = unsigned[:, first : first + 2] @ padded[first : first + 2]
            total += np.clip(pair, -(2**15), 2**15 - 1)
        total += (linear.qmin - linear.zero_point) * weight.sum(0)
    else:
        total = (codes - linear.zero_point) @ weight
    step = np.float64(np.float32(linear.scale)) * linear.weight_scale.astype(np.float64)
    result: NDArray[np.float64] = total * step
    return result if linear.bias is None else result + linear.bias.astype(np.float64)


def layer_model(read: QdqGraph, linear: QdqLinear) -> Any:
    """A graph of one layer: float32 ``[rows, in]`` to ``[rows, out]``."""
    from onnx import TensorProto, helper

    inputs, outputs = linear.codes.shape
    wanted = {name for node in linear.nodes for name in node.input}
    graph = helper.make_graph(
        linear.nodes,
        "layer",
        [helper.make_tensor_value_info(linear.source, TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info(linear.result, TensorProto.FLOAT, ["rows", outputs])],
        [tensor for tensor in read.model.graph.initializer if tensor.name in wanted],
    )
    return helper.make_model(graph, opset_imports=read.model.opset_import, ir_version=read.model.ir_version)


def float_twin(read: QdqGraph) -> Any:
    """The same graph with the quantized weights multiplied out and nothing rounded: what speed is compared with.

    A `Gemm` becomes a plain `MatMul` and `Add` again.
    """
    from onnx import helper, numpy_helper

    model = copy.deepcopy(read.model)
    graph = model.graph
    new: dict[str, list[Any]] = {}
    for linear in read.linears.values():
        weight = linear.codes.astype(np.float32) * linear.weight_scale
        graph.initializer.append(numpy_helper.from_array(weight, f"{linear.name}/float"))
        source, result = linear.source, linear.result
        product = result if linear.bias is None else f"{linear.name}/product"
        nodes = [helper.make_node("MatMul", [source, f"{linear.name}/float"], [product])]
        if linear.bias is not None:
            graph.initializer.append(numpy_helper.from_array(linear.bias, f"{linear.name}/float_bias"))
            nodes.append(helper.make_node("Add", [product, f"{linear.name}/float_bias"], [result]))
        new[result] = nodes
    nodes = [made for node in graph.node for made in new.get(node.output[0], [node])]
    nodes = reached(nodes, [output.name for output in graph.output])
    read_names = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read_names]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return model


def token_feed(read: QdqGraph, folder: Path, rows: int = 2, tokens: int = 32) -> dict[str, NDArray[np.int64]]:
    """Inputs of a graph of token ids, the same in every run: text where the folder has a tokenizer, else random ids.

    Text, because what a quantized model does with random ids is far outside of its ranges and close to chaotic.
    """
    ids = _text(folder, rows, tokens)
    if ids is None:
        vocabulary = min((read_table.dims[0] for read_table in _tables(read)), default=100)
        ids = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {value.name: feed[value.name] for value in read.model.graph.input}


def reference_output(
    read: QdqGraph, feed: dict[str, NDArray[np.int64]], model: OpenedModel | None
) -> tuple[NDArray[Any], float]:
    """What the whole model must give, and how much of that a tiny change of the embeddings moves.

    Computed by calib's quantized model, or without the float model by the graph, node by node. The second number is
    the largest change, relative to the largest output, when every embedding is changed by a factor of 1 +- 1e-4: a few
    values then take the next code, as they do where sums are added in another order.
    """
    if model is None:
        from calib.export.onnx_lint import session

        found = session(read.model.SerializeToString(), threads=1, plain=True).run(None, feed)[0]
        moved = session(_moved(read).SerializeToString(), threads=1, plain=True).run(None, feed)[0]
        return found, largest_difference(moved, found)
    import torch

    from calib.quantized import QuantizedModel

    inputs = {name: torch.from_numpy(value) for name, value in feed.items()}
    table: Any = model.model.get_input_embeddings()  # type: ignore[operator]
    own = table.weight
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _stored_biases(read, model), QuantizedModel(model.model, onnx_plan(read, model)):
        ours = np.asarray(first_output(model.model(**inputs)))
        try:
            table.weight = torch.nn.Parameter(own * (1 + _NUDGE * noise), requires_grad=False)
            nudged = np.asarray(first_output(model.model(**inputs)))
        finally:
            table.weight = own
    return ours, largest_difference(nudged, ours)


def onnx_plan(read: QdqGraph, model: OpenedModel) -> Any:
    """A quantization plan with the codes and scales of a graph."""
    import torch

    from calib.quantized.grid import IntegerGrid
    from calib.quantized.plan import QuantizationPlan
    from calib.quantized.quantizers import StaticQuantizer
    from calib.quantized.weights import QuantizedWeight

    inputs, weights = {}, {}
    for name, linear in read.linears.items():
        symmetric = linear.zero_point == 0 and linear.qmin == -128
        grid = IntegerGrid(linear.qmin, linear.qmax, 127.0 if symmetric else 255.0, symmetric)
        point = None if symmetric else torch.tensor(float(linear.zero_point))
        module = name.partition("#")[0]
        inputs[module] = StaticQuantizer(grid, torch.tensor(linear.scale), point)
        codes = torch.from_numpy(linear.codes.T.copy())
        weights[module] = QuantizedWeight(codes, torch.from_numpy(linear.weight_scale.copy()).reshape(-1, 1))
    return QuantizationPlan(inputs=inputs, weights=weights)


@contextmanager
def _stored_biases(read: QdqGraph, model: OpenedModel) -> Iterator[None]:
    """The model with biases as the graph holds them, in int32 steps of its products."""
    import torch

    own: list[tuple[Any, Any]] = []
    try:
        for name, linear in read.linears.items():
            module: Any = model.model.get_submodule(name.partition("#")[0])
            if linear.bias is not None and getattr(module, "bias", None) is not None:
                own.append((module, module.bias))
                module.bias = torch.nn.Parameter(torch.from_numpy(linear.bias.copy()), requires_grad=False)
        yield
    finally:
        for module, bias in reversed(own):
            module.bias = bias


def _text(folder: Path, rows: int, tokens: int) -> NDArray[np.int64] | None:
    from calib.corpus import build_blocks
    from calib.errors import CalibError
    from calib.models.tokens import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder, folder.name, trust_remote_code=False)
        blocks = build_blocks(["builtin:speeches"], tokenizer, samples=rows, max_length=tokens)
    except CalibError:
        return None
    return blocks.input_ids.astype(np.int64)


def _tables(read: QdqGraph) -> list[Any]:
    """Initializers that token ids are looked up in."""
    graph = read.model.graph
    names = {node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"}
    return [tensor for tensor in graph.initializer if tensor.name in names]


def _moved(read: QdqGraph) -> Any:
    from onnx import numpy_helper

    moved = QdqGraph(copy.deepcopy(read.model))
    for tensor in _tables(moved):
        values = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(0).standard_normal(values.shape)
        tensor.CopyFrom(numpy_helper.from_array((values * (1 + _NUDGE * noise)).astype(np.float32), tensor.name))
    return moved.model
