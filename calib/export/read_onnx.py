# SPDX-License-Identifier: Apache-2.0
"""Reads quantized matrix products of a Q/DQ graph, ours or another program's, and says what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import ArtifactError

__all__ = ["QdqGraph", "QdqLinear", "read_onnx"]

_SMALLEST = 2.0**-126
_GRIDS = {np.dtype(np.int8): (-128, 127), np.dtype(np.uint8): (0, 255)}


@dataclass(frozen=True, eq=False)
class QdqLinear:
    """One product of a dequantized input by a dequantized weight.

    Attributes:
        name: of the module; `module#1` for its second call.
        scale: of the input.
        zero_point: of the input, on the grid qmin..qmax.
        qmin: -128 or 0.
        qmax: 127 or 255.
        codes: int8 ``[in, out]``.
        weight_scale: float32 ``[out]``, or ``[1]``.
        bias: float32 ``[out]``, multiplied out; None if there is none.
        nodes: that compute it, from the quantization of the input to the product.
        source: name of the input, float.
        result: name of the output.
        factors: float32 ``[in]`` that the input was multiplied by just before; None if it was not.
    """

    name: str
    scale: float
    zero_point: int
    qmin: int
    qmax: int
    codes: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    nodes: list[Any]
    source: str
    result: str
    factors: NDArray[np.float32] | None = None


@dataclass(eq=False)
class QdqGraph:
    """What a graph says.

    Attributes:
        model: the graph, weights included.
        linears: by name, in the order of the graph; only valid ones.
        scales: how many scales and zero points were looked at.
        problems: one line each.
    """

    model: Any
    linears: dict[str, QdqLinear] = field(default_factory=dict)
    scales: int = 0
    problems: list[str] = field(default_factory=list)


def read_onnx(path: Path) -> QdqGraph:
    """Reads a graph with its weights.

    Raises:
        ArtifactError: the file is missing or no ONNX graph.
    """
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model if model.ByteSize() < 2**31 - 1 else str(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: is missing, or its weights are ({error}); export again") from None
    except Exception as error:  # protobuf, the checker and external data have no exception in common
        raise ArtifactError(
            f"{path}: is no valid ONNX graph ({' '.join(str(error).split())[:200]}); export again"
        ) from None
    read = QdqGraph(model)
    reader = _Reader(read)
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            reader.product(node)
    return read


class _Reader:
    def __init__(self, read: QdqGraph) -> None:
        from onnx import numpy_helper

        self.read = read
        self.constants = {tensor.name: tensor for tensor in read.model.graph.initializer}
        self.makers = {name: node for node in read.model.graph.node for name in node.output}
        self.to_array = numpy_helper.to_array

    def product(self, node: Any) -> None:
        """Adds a product if both of its factors are dequantized and the second one is a constant."""
        first, second = self.maker(node.input[0]), self.maker(node.input[1])
        if first is None or second is None or second.input[0] not in self.constants:
            return
        quantize = self.makers.get(first.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return
        name = _name(node, second)
        grid = self.grid(f"{name}:input", first, quantize)
        rows = self.rows(f"{name}:weight", second)
        third = self.maker(node.input[2]) if len(node.input) > 2 else None
        bias = None
        if len(node.input) > 2:
            bias = self.bias(third) if third is not None else self.value(node.input[2])
        if grid is None or rows is None:
            return
        nodes = [quantize, first, second, *([third] if third is not None else []), node]
        self.read.linears[name] = QdqLinear(
            name,
            *grid,
            *rows,
            bias,
            nodes,
            str(quantize.input[0]),
            str(node.output[0]),
            self.factors(quantize.input[0], rows[0].shape[0]),
        )

    def maker(self, name: str) -> Any:
        """The DequantizeLinear that makes a tensor."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def factors(self, name: str, inputs: int) -> NDArray[np.float32] | None:
        """What a tensor was multiplied by, channel by channel, in the node that made it."""
        node = self.makers.get(name)
        while node is not None and node.op_type == "Reshape":
            node = self.makers.get(node.input[0])
        if node is None or node.op_type != "Mul":
            return None
        constants = [value for value in map(self.value, node.input) if value is not None]
        return next((value for value in constants if value.shape == (inputs,)), None)

    def value(self, name: str) -> NDArray[Any] | None:
        """A constant."""
        found: NDArray[Any] | None = self.to_array(self.constants[name]) if name in self.constants else None
        return found

    def grid(self, name: str, dequantize: Any, quantize: Any) -> tuple[float, int, int, int] | None:
        """Scale, zero point, first and last code of an input."""
        self.read.scales += 1
        scale = self.value(quantize.input[1])
        point = self.value(quantize.input[2]) if len(quantize.input) > 2 else np.array(0, np.uint8)
        if scale is None or point is None or scale.size != 1:
            self.read.problems.append(f"{name}: its scale is no single constant")
            return None
        if list(dequantize.input[1:]) != list(quantize.input[1:]):
            other = self.value(dequantize.input[1])
            if other is None or not np.array_equal(other, scale):
                self.read.problems.append(f"{name}: is quantized and dequantized with different scales")
                return None
        if scale.dtype != np.float32 or not _usable(scale):
            self.read.problems.append(f"{name}: holds {scale.reshape(-1)[0]} ({scale.dtype}), no usable scale")
            return None
        if point.dtype not in _GRIDS:
            self.read.problems.append(f"{name}: zero point is {point.dtype}, must be int8 or uint8")
            return None
        return float(scale.reshape(-1)[0]), int(point.reshape(-1)[0]), *_GRIDS[point.dtype]

    def rows(self, name: str, node: Any) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """Codes and scales of a weight."""
        self.read.scales += 1
        codes, scale = self.value(node.input[0]), self.value(node.input[1])
        if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
            self.read.problems.append(f"{name}: is no int8 matrix")
            return None
        if scale is None or scale.dtype != np.float32 or not _usable(scale):
            self.read.problems.append(f"{name}: its scale holds no usable number")
            return None
        if scale.size not in (1, codes.shape[1]):
            self.read.problems.append(f"{name}: has {scale.size} scales for {codes.shape[1]} outputs")
            return None
        return codes, scale.reshape(-1)

    def bias(self, node: Any) -> NDArray[np.float32] | None:
        codes, scale = self.value(node.input[0]), self.value(node.input[1])
        if codes is None or scale is None:
            return None
        found: NDArray[np.float32] = codes.astype(np.float32) * scale
        return found


def _usable(scale: NDArray[Any]) -> bool:
    return bool(np.isfinite(scale).all() and (scale >= _SMALLEST).all())


def _name(node: Any, weight: Any) -> str:
    """Module of a product: from our names, else from the name of its weight."""
    held = str(weight.input[0])
    for suffix in ("/weight_quantized", ".weight_quantized", "_quantized", ".weight"):
        held = held.removesuffix(suffix)
    if held.startswith(("onnx::", "val_")) and node.name:
        return str(node.name)
    return held
