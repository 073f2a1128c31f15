# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph with scales as QuantizeLinear / DequantizeLinear, in the form that runtimes execute in integers.

ONNX Runtime multiplies in integers only what its rules recognise. Measured with 1.32: a `MatMul` followed by a float
bias becomes a `Gemm` that refuses integers and runs slower than float; one `QuantizeLinear` that feeds q, k and v
leaves them in float. So every linear layer gets a `QuantizeLinear` of its own and becomes a `Gemm` of two dimensions
with an int32 bias, whose scale is that of the input times that of the row: it becomes a `QGemm`. No session option is
needed. OpenVINO reads the same file.

Scales: amax / 127 (int8, zero point 0) or (max - min) / 255 (int8 with a zero point); weights int8 per output channel.
The cure `scale` is a `Mul` in front of a `QuantizeLinear`, one for all layers that read its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import ModelError, UsageError
from calib.export.checkpoint import copy_companions, read_config, write_config
from calib.export.formats import register
from calib.export.linears import LinearRange, linear_ranges
from calib.export.onnx_graph import FloatGraph, Product, float_graph, reached, save_onnx
from calib.export.onnx_rows import keep_rows
from calib.export.request import ExportRequest, ExportSummary
from calib.quantized import QuantizedWeight
from calib.scales.grid import Grid

__all__ = ["FILE", "export_onnx_qdq", "quantized_graph", "weight_grid"]

FILE = "model.onnx"
_LARGEST_BIAS = 2**31 - 2**20  # an int32 sum must still fit above it


@register(
    "onnx-qdq",
    summary="ONNX graph with Q/DQ around every linear layer, in the form that runs in integers",
    carries="weights, input scales and zero points, names of the graph",
    consumers=("ONNX Runtime", "OpenVINO", "TensorRT (symmetric)", "QNN execution provider"),
    proven="ONNX Runtime and OpenVINO, executing integers",
    cures=("smooth", "rotate", "scale", "keep", "clip", "compensate"),
    model=True,
    extra="onnx",
)
def export_onnx_qdq(request: ExportRequest) -> ExportSummary:
    """Writes `model.onnx`, configuration and tokenizer, and counts the layers that ONNX Runtime runs in integers.

    Raises:
        UsageError: the scales are not 8-bit.
        ModelError: the model cannot be exported, or no layer has a scale.
    """
    model, summary = quantized_graph(request)
    save_onnx(model, request.folder / FILE)
    write_config(read_config(request.opened), request.folder)
    copy_companions(request.opened, request.folder)
    from calib.export.onnx_lint import integer_layers

    integer = integer_layers(request.folder / FILE)
    slow = sorted(set(summary.quantized) - set(integer))
    note = f"ONNX Runtime runs {len(integer)} of {len(summary.quantized)} quantized layers in integers"
    summary.notes.append(note + (f"; not {', '.join(slow[:5])}" if slow else ""))
    return summary


def quantized_graph(request: ExportRequest) -> tuple[Any, ExportSummary]:
    """The graph, and what is in it.

    Raises:
        UsageError: the scales are not 8-bit.
        ModelError: the model cannot be exported, is in half precision, or no layer has a scale.
    """
    if request.scales.bits != 8:
        raise UsageError(f"onnx-qdq: --bits {request.scales.bits} has no integer kernel; only 8 has")
    dtype = request.scales.model.dtype
    if dtype != "float32":
        raise ModelError(
            f"{request.opened.provenance.name}: was measured in {dtype}, and runtimes have no integer kernels between "
            "layers in that; measure and quantize it with --dtype float32"
        )
    linears = linear_ranges(request.scales, request.opened.model, fused=False, conv1d=True)
    found = float_graph(request.opened)
    in_float = dict(linears.in_float)
    rewriter = _Rewriter(found, request.weights)
    for product in found.products:
        wanted = linears.ranges.get(product.module)
        if wanted is not None:
            reason = rewriter.quantize(product, wanted)
            if reason is not None:
                in_float[product.module] = reason
    for name in linears.ranges:
        if name not in rewriter.done and name not in in_float:
            in_float[name] = "the exported graph does not hold it as one matrix product"
    quantized = [name for name in linears.ranges if name not in in_float]
    if not quantized:
        raise ModelError(
            f"{request.opened.provenance.name}: no layer of the graph could be quantized; see calib formats"
        )
    model = rewriter.finish()
    return model, ExportSummary(quantized, in_float, [], list(linears.notes), {"onnx": rewriter.aliases})


class _Rewriter:
    """Replaces products of a graph by quantized ones."""

    def __init__(self, found: FloatGraph, rounded: Mapping[str, QuantizedWeight]) -> None:
        from onnx import numpy_helper

        self.rounded = rounded

        self.model = found.model
        self.graph = found.model.graph
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in self.graph.initializer}
        self.to_array = numpy_helper.to_array
        self.from_array = numpy_helper.from_array
        self.replaced: dict[int, list[Any]] = {}
        self.done: dict[str, int] = {}
        self.aliases: dict[str, str] = {}

    def quantize(self, product: Product, wanted: LinearRange) -> str | None:
        """Replaces one product; returns why it cannot be done, and then leaves it as it was."""
        weight = self.to_array(self.constants[product.weight])
        codes, weight_scale = _weight(weight, wanted, self.rounded.get(product.module))
        scale, point = wanted.grid()
        bias = None
        if product.bias is not None:
            step = (np.float32(scale) * weight_scale).astype(np.float32)
            with np.errstate(over="ignore", divide="ignore"):
                whole = np.rint(self.to_array(self.constants[product.bias]).astype(np.float64) / step)
            if not (np.abs(whole) < _LARGEST_BIAS).all():
                return "its bias is too large for an int32 of the scale of its products"
            bias = (whole.astype(np.int32), step)
        name = product.module
        call = self.done.get(name, 0)
        self.done[name] = call + 1
        if call:
            name = f"{name}#{call}"
        self.aliases[f"{name}:input"] = product.source
        self.aliases[f"{name}:weight"] = f"{name}/weight_quantized"
        nodes = self._nodes(product, name, scale, point, codes, weight_scale, bias)
        self.replaced[product.node] = nodes
        if product.add is not None:
            self.replaced[product.add] = []
        return None

    def _nodes(
        self,
        product: Product,
        name: str,
        scale: float,
        point: int,
        codes: NDArray[np.int8],
        weight_scale: NDArray[np.float32],
        bias: tuple[NDArray[np.int32], NDArray[np.float32]] | None,
    ) -> list[Any]:
        from onnx import helper

        inputs, outputs = codes.shape

        def constant(what: str, value: NDArray[Any]) -> str:
            tensor = self.from_array(value, f"{name}/{what}")
            self.graph.initializer.append(tensor)
            return str(tensor.name)

        def node(op: str, taken: list[str], what: str, **more: Any) -> str:
            made = helper.make_node(op, taken, [f"{name}/{what}"], name=f"{name}/{what}", **more)
            nodes.append(made)
            return str(made.output[0])

        nodes: list[Any] = []
        grid = [constant("scale", np.array(scale, np.float32)), constant("zero_point", np.array(point, np.int8))]
        flat = node("Reshape", [product.source, constant("rows", np.array([-1, inputs], np.int64))], "flat")
        quantized = node("QuantizeLinear", [flat, *grid], "quantized")
        terms = [node("DequantizeLinear", [quantized, *grid], "dequantized")]
        rows = [
            constant("weight_quantized", codes),
            constant("weight_scale", weight_scale),
            constant("weight_zero_point", np.zeros(outputs, np.int8)),
        ]
        terms.append(node("DequantizeLinear", rows, "weight", axis=1))
        if bias is not None:
            parts = [
                constant("bias_quantized", bias[0]),
                constant("bias_scale", bias[1]),
                constant("bias_zero_point", np.zeros(outputs, np.int32)),
            ]
            terms.append(node("DequantizeLinear", parts, "bias", axis=0))
        product_rows = node("Gemm", terms, "gemm")
        lead = node("Shape", [product.source], "lead", start=0, end=-1)
        shape = node("Concat", [lead, constant("outputs", np.array([outputs], np.int64))], "shape", axis=0)
        nodes.append(
            helper.make_node("Reshape", [product_rows, shape], [product.result], name=f"{name}/reshaped"),
        )
        return nodes

    def finish(self) -> Any:
        """The graph with its new nodes, without weights that nothing reads any more."""
        import onnx

        nodes = [made for index, node in enumerate(self.graph.node) for made in self.replaced.get(index, [node])]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        gone = keep_rows(self.graph)
        self.aliases = {name: gone.get(tensor, tensor) for name, tensor in self.aliases.items()}
        wanted = [output.name for output in self.graph.output]
        nodes = reached(list(self.graph.node), wanted)
        read = {name for node in nodes for name in node.input} | {*wanted}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(kept)
        onnx.checker.check_model(self.model)
        return self.model


def weight_grid(weight: NDArray[np.float32], wanted: LinearRange) -> NDArray[np.float32]:
    """Scales ``[out]`` of a weight ``[in, out]``: those of the scale file, or amax / 127 of each output channel."""
    record = wanted.weight
    if record is not None and isinstance(record.scale, list) and record.scheme.symmetric and record.scheme.bits == 8:
        return np.array(record.scale, np.float32)
    amax = np.abs(weight).max(0).astype(np.float64)
    whole = Grid(8).step(-float(amax.max()), float(amax.max()))
    fallback = whole.scale if whole is not None else 1.0
    return np.where(amax > 0, amax / 127, fallback).astype(np.float32)


def _weight(
    weight: NDArray[np.float32], wanted: LinearRange, rounded: QuantizedWeight | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes ``[in, out]`` and scales ``[out]``: those of a weight that was rounded before, or each to the nearest."""
    if rounded is not None:
        held = np.broadcast_to(rounded.scale.cpu().numpy().reshape(-1), weight.shape[1])
        return np.ascontiguousarray(rounded.codes.cpu().numpy().T), np.ascontiguousarray(held)
    scale = weight_grid(weight, wanted)
    codes = np.clip(np.rint(weight.astype(np.float32) / scale), -127, 127)
    return codes.astype(np.int8), scale
