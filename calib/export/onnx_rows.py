# SPDX-License-Identifier: Apache-2.0
"""Keeps what lies between quantized products in two dimensions, ``[batch * sequence, channels]``.

A product of two dimensions is what runtimes multiply in integers. Going back to three after each costs a handful of
small nodes per layer; and ONNX Runtime fuses an addition and a LayerNormalization of three dimensions into one kernel
(`SkipLayerNormalization`) that is several times slower than the two alone (`benchmarks/export_minilm_profile.py`).
So element-wise functions, additions and norms over channels are moved in front of the Reshape that follows a product.
They compute the same, number by number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["keep_rows"]

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Gelu", "Erf", "Tanh", "Sigmoid", "Relu", "LayerNormalization"}


def keep_rows(graph: Any) -> dict[str, str]:
    """Rewrites a graph whose products are `NAME/flat` (Reshape), ..., `NAME/gemm`, `NAME/reshaped` (Reshape).

    Args:
        graph: with the shapes of its tensors, inputs of ``[batch, sequence]`` first; changed in place.

    Returns:
        Tensors of three dimensions that are gone -> the one of two dimensions in their place.
    """
    nodes = list(graph.node)
    rows = _Rows(graph)
    for node in nodes:
        rows.take(node)
    rows.finish()
    del graph.node[:]
    graph.node.extend(rows.nodes)
    made = {name for node in rows.nodes for name in node.output}
    return {name: flat for name, flat in rows.flat.items() if name not in made}


@dataclass
class _Rows:
    """The graph as it is written anew, node by node.

    Attributes:
        flat: tensor of three dimensions -> the same in two, already made.
    """

    graph: Any
    nodes: list[Any] = field(default_factory=list)
    flat: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.shapes: dict[str, list[Any]] = {
            value.name: [*map(_dimension, value.type.tensor_type.shape.dim)] for value in values
        }
        self.ranks = {tensor.name: list(tensor.dims) for tensor in self.graph.initializer}
        first = self.graph.input[0]
        self.ids = first.name
        self.lead = self.shapes[first.name]
        self.made: set[str] = {value.name for value in self.graph.input} | {*self.ranks}
        self.widths: set[int] = set()
        self.unused: set[str] = set()  # shapes of three dimensions, each made for one product

    def take(self, node: Any) -> None:
        """Writes a node, in two dimensions if that is possible and its inputs are."""
        if node.name.endswith("/lead") and self.whole(node.input[0]):
            self.unused.add(node.output[0])
            return
        if self.unused.intersection(node.input):
            if node.name.endswith("/reshaped"):
                self.flat[node.output[0]] = node.input[0]
            else:
                self.unused.add(node.output[0])
            return
        if node.name.endswith("/flat") and node.input[0] in self.flat:
            node.input[0] = self.flat[node.input[0]]
        elif self.fits(node):
            self.convert(node)
        elif not (node.op_type == "Reshape" and node.input[0] in self.flat and _takes_any_rank(node)):
            for name in node.input:
                self.restore(name)
        else:
            node.input[0] = self.flat[node.input[0]]
        self.write(node)

    def fits(self, node: Any) -> bool:
        """An element-wise function of tensors of one shape, one of them in two dimensions, and of vectors."""
        if node.op_type not in _ELEMENTWISE or len(node.output) != 1 or not self.whole(node.output[0]):
            return False
        if node.op_type == "LayerNormalization" and not any(
            a.name == "axis" and a.i in (-1, 2) for a in node.attribute
        ):
            return False
        width = self.shapes[node.output[0]][2]
        tensors = [name for name in node.input if name not in self.ranks]
        vectors = [self.ranks[name] for name in node.input if name in self.ranks]
        return (
            any(name in self.flat for name in tensors)
            and all(self.whole(name) and self.shapes[name][2] == width for name in tensors)
            and all(shape in ([], [1], [width]) for shape in vectors)
        )

    def convert(self, node: Any) -> None:
        for place, name in enumerate(node.input):
            if name in self.ranks:
                continue
            if name not in self.flat:
                self.reshape(name, f"{name}/rows", [-1, self.shapes[name][2]])
                self.flat[name] = f"{name}/rows"
            node.input[place] = self.flat[name]
        for attribute in node.attribute:
            if attribute.name == "axis":
                attribute.i = -1
        whole = node.output[0]
        node.output[0] = self.flat[whole] = f"{whole}/rows"

    def restore(self, name: str) -> None:
        """Makes a tensor of three dimensions that somebody needs as it was."""
        from onnx import helper

        if name not in self.flat or name in self.made:
            return
        width = self.shapes[name][2]
        if not self.widths:
            self.write(helper.make_node("Shape", [self.ids], ["rows/lead"], name="rows/lead", start=0, end=2))
        shape = f"rows/shape_{width}"
        if width not in self.widths:
            self.constant(f"rows/width_{width}", [width])
            parts = ["rows/lead", f"rows/width_{width}"]
            self.write(helper.make_node("Concat", parts, [shape], name=shape, axis=0))
            self.widths.add(width)
        self.write(helper.make_node("Reshape", [self.flat[name], shape], [name], name=f"{name}/whole"))

    def finish(self) -> None:
        """Outputs of the graph keep their shapes."""
        for value in self.graph.output:
            self.restore(value.name)

    def reshape(self, name: str, result: str, shape: list[int]) -> None:
        from onnx import helper

        self.constant(f"{result}/shape", shape)
        self.write(helper.make_node("Reshape", [name, f"{result}/shape"], [result], name=result))

    def constant(self, name: str, values: list[int]) -> None:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))

    def write(self, node: Any) -> None:
        self.nodes.append(node)
        self.made.update(node.output)

    def whole(self, name: str) -> bool:
        """Has the shape ``[batch, sequence, channels]``, with channels known."""
        shape = self.shapes.get(name, [])
        return len(shape) == 3 and shape[:2] == self.lead and isinstance(shape[2], int) and shape[2] > 0


def _dimension(dimension: Any) -> int | str:
    return str(dimension.dim_param) if dimension.dim_param else int(dimension.dim_value)


def _takes_any_rank(node: Any) -> bool:
    """A Reshape that copies no dimension of its input: 0 means 0."""
    return any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
