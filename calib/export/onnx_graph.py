# SPDX-License-Identifier: Apache-2.0
"""The float ONNX graph of a model, by torch's exporter, with the name of the module of every matrix product."""

from __future__ import annotations

import ast
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError
from calib.measurement.head import takes_cache
from calib.models import OpenedModel
from calib.models.reason import reason

__all__ = ["OPSET", "FloatGraph", "Product", "float_graph", "reached", "save_onnx"]

OPSET = 20
"""The first with `Gelu`, which runtimes compute in one kernel; Q/DQ with an axis need 13."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST = 1_500_000_000  # protobuf refuses 2 GiB in one file


@dataclass(frozen=True)
class Product:
    """One multiplication by a weight.

    Attributes:
        module: name of the linear layer.
        node: index of the `MatMul` or `Gemm` in the graph.
        add: index of the `Add` of its bias, if that is a node of its own.
        source: name of the input.
        weight: initializer ``[in, out]``.
        bias: initializer ``[out]``, if any.
        result: name of the output, bias included.
    """

    module: str
    node: int
    add: int | None
    source: str
    weight: str
    bias: str | None
    result: str


@dataclass(frozen=True)
class FloatGraph:
    """A graph and its matrix products, in the order of the graph. A module that is called twice is there twice."""

    model: Any
    products: list[Product]


def float_graph(opened: OpenedModel) -> FloatGraph:
    """Exports a model of token ids: inputs `input_ids` and `attention_mask`, int64 ``[batch, sequence]``, both free.

    The output is logits or the last hidden state. Attention is exported in its plain form, which runtimes fuse.

    Raises:
        ModelError: the model takes other inputs, or torch cannot export it.
    """
    model = opened.model
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        raise ModelError(f"{opened.provenance.name}: takes no token ids; only language models are exported to ONNX")
    names = [name for name in ("input_ids", "attention_mask") if name in accepted]
    ids = torch.zeros(2, 8, dtype=torch.long)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    free = {0: "batch", 1: "sequence"}
    try:
        with _plain_attention(model), _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Outputs(model).eval(),
                (),
                kwargs={name: example[name] for name in names},
                dynamic_shapes=dict.fromkeys(names, free),
                output_names=["output"],
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=True,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch's own error is advice on how to change the code of the model
            cause = cause.__cause__
        raise ModelError(
            f"{opened.provenance.name}: torch cannot export it to ONNX ({reason(cause, 200)}); "
            "choose a format without a graph (`calib formats`)"
        ) from error
    return _with_products(program.model_proto)


def save_onnx(model: Any, path: Path) -> None:
    """Writes a graph; weights go to a file beside it where protobuf could not hold them."""
    import onnx

    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data")


class _Outputs(nn.Module):
    """One tensor as output, no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.more = {"use_cache": False} if takes_cache(model) else {}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.model(input_ids=input_ids, **masked, **self.more)
        if isinstance(output, torch.Tensor):
            return output
        found: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return found


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Matrix products and a softmax instead of the fused function, whose export adds a test for NaN per layer."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    choose: Any = getattr(model, "set_attn_implementation", None)
    if choose is None or before in (None, "eager"):
        yield
        return
    choose("eager")
    try:
        yield
    finally:
        choose(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _with_products(model: Any) -> FloatGraph:
    graph = model.graph
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    products = []
    for index, node in enumerate(graph.node):
        module = _module_of(node)
        if node.op_type not in ("MatMul", "Gemm") or module is None or len(constants.get(node.input[1], [])) != 2:
            continue
        if node.op_type == "Gemm" and any(a.name in ("transA", "transB") and a.i for a in node.attribute):
            continue
        add, bias, result = None, node.input[2] if len(node.input) > 2 else None, node.output[0]
        users = readers.get(result, [])
        if node.op_type == "MatMul" and len(users) == 1 and graph.node[users[0]].op_type == "Add":
            other = [name for name in graph.node[users[0]].input if name != result]
            if len(other) == 1 and len(constants.get(other[0], [])) == 1:
                add, bias, result = users[0], other[0], graph.node[users[0]].output[0]
        products.append(Product(module, index, add, node.input[0], node.input[1], bias, result))
    return FloatGraph(model, products)


def _module_of(node: Any) -> str | None:
    """Name of the module whose forward made a node; the last scope is the operation itself, the first the wrapper."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            if len(scopes) > 1:
                return str(scopes[-2]).removeprefix("model.")
    return None


def reached(nodes: list[Any], outputs: list[str]) -> list[Any]:
    """Nodes that the outputs need, in their order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]
