# SPDX-License-Identifier: Apache-2.0
"""AIMET encodings (0.6.1, 1.0.0, 2.0.0) beside the float ONNX graph whose names they use.

0.6.1 and 1.0.0 count codes from 0 whether the grid is symmetric or not: `offset` is minus the code of 0 on 0..255, so
-128 for a symmetric one. 2.0.0 has ONNX's meaning: `y_zero_point` in the type of the codes. Only linear inputs and
weights are listed; a name that the graph lacks is refused by AIMET, a tensor without an encoding stays in float. AIMET
rounds a tensor for all of its readers: where a linear layer reads the residual stream, so does the addition.
Source: aimet-onnx 2.42, `aimet_onnx/common/quantsim.py` and `quantsim.py` (`load_encodings_to_sim`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.errors import UsageError
from calib.export.formats import register
from calib.export.linears import LinearRange, linear_ranges
from calib.export.onnx_graph import float_graph, save_onnx
from calib.export.onnx_qdq import weight_grid
from calib.export.request import ExportRequest, ExportSummary

__all__ = ["FILE", "Encoding", "encodings", "export_aimet"]

FILE = "model.encodings"
GRAPH = "model.onnx"
_LEVELS = 255
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}


@dataclass(frozen=True)
class Encoding:
    """One tensor of a graph.

    Attributes:
        name: in the graph.
        parameter: a weight, one scale per output channel.
        scale: one, or one per channel.
        zero_point: on -128..127.
        symmetric: of the grid.
        axis: of the channels of a weight.
    """

    name: str
    parameter: bool
    scale: list[float]
    zero_point: int
    symmetric: bool
    axis: int = 1


@register(
    "aimet",
    summary="float ONNX graph and encodings that AIMET, QNN and SNPE take",
    carries="input scales and zero points, weight scales, names of the graph",
    consumers=("AIMET", "QNN --quantization_overrides (0.6.1, 1.0.0)", "SNPE (0.6.1)"),
    proven="aimet-onnx",
    variants=("1.0.0", "0.6.1", "2.0.0"),
    model=True,
    extra="onnx",
)
def export_aimet(request: ExportRequest) -> ExportSummary:
    """Writes `model.onnx` in float and `model.encodings`.

    Raises:
        UsageError: the scales are not 8-bit.
        ModelError: the model cannot be exported, or no layer has a scale.
    """
    if request.scales.bits != 8:
        raise UsageError(f"aimet: --bits {request.scales.bits} is not written here; only 8 is")
    linears = linear_ranges(request.scales, request.opened.model, fused=False, conv1d=True)
    found = float_graph(request.opened)
    weights = {tensor.name: tensor for tensor in found.model.graph.initializer}
    in_float = dict(linears.in_float)
    inputs: dict[str, list[LinearRange]] = {}
    made: dict[str, Encoding] = {}
    aliases: dict[str, str] = {}
    from onnx import numpy_helper

    sources = _Sources(found.model.graph)
    for product in found.products:
        wanted = linears.ranges.get(product.module)
        if wanted is None:
            continue
        source = sources.of(product.source)
        inputs.setdefault(source, []).append(wanted)
        scale = weight_grid(numpy_helper.to_array(weights[product.weight]), wanted)
        made[product.weight] = Encoding(product.weight, True, [float(s) for s in scale], 0, True)
        aliases[f"{product.module}:input"] = source
        aliases[f"{product.module}:weight"] = product.weight
    # a tensor that several layers read has one encoding: the widest of their ranges
    for name, readers in inputs.items():
        low, high = min(r.low for r in readers), max(r.high for r in readers)
        whole = LinearRange(name, low, high, all(r.symmetric for r in readers))
        step, point = whole.grid()
        made[name] = Encoding(name, False, [step], point, whole.symmetric)
    for name in linears.ranges:
        if f"{name}:input" not in aliases:
            in_float[name] = "the exported graph does not hold it as one matrix product"
    save_onnx(found.model, request.folder / GRAPH)
    text = json.dumps(encodings(list(made.values()), request.variant), indent=1)
    (request.folder / FILE).write_text(text + "\n", encoding="utf-8")
    quantized = [name for name in linears.ranges if name not in in_float]
    return ExportSummary(quantized, in_float, [], list(linears.notes), {"onnx": aliases})


class _Sources:
    """Where a tensor is computed, before it is only reshaped: AIMET puts its quantizers there, and 2.0.0 needs them."""

    def __init__(self, graph: Any) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = Counter(name for node in graph.node for name in node.input)

    def of(self, name: str) -> str:
        """The name of the tensor, as long as nothing else reads it on the way."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in _MOVES and self.readers[maker.input[0]] == 1:
            name = str(maker.input[0])
            maker = self.makers.get(name)
        return name


def encodings(made: list[Encoding], version: str) -> dict[str, Any]:
    """The content of an encodings file of a version."""
    if version == "2.0.0":
        return {"version": version, "encodings": [_version_2(one) for one in made]}
    inputs, weights = [e for e in made if not e.parameter], [e for e in made if e.parameter]
    if version == "1.0.0":
        return {
            "version": version,
            "producer": "calib",
            "activation_encodings": [_version_1(one) for one in inputs],
            "param_encodings": [_version_1(one) for one in weights],
        }
    return {
        "version": version,
        "activation_encodings": {one.name: _version_0(one) for one in inputs},
        "param_encodings": {one.name: _version_0(one) for one in weights},
    }


def _version_0(one: Encoding) -> list[dict[str, Any]]:
    offset = -(one.zero_point + 128)
    return [
        {
            "bitwidth": 8,
            "dtype": "int",
            "is_symmetric": str(one.symmetric),
            "scale": scale,
            "offset": offset,
            "min": float(np.float64(scale) * offset),
            "max": float(np.float64(scale) * (offset + _LEVELS)),
        }
        for scale in one.scale
    ]


def _version_1(one: Encoding) -> dict[str, Any]:
    return {
        "name": one.name,
        "bw": 8,
        "dtype": "INT",
        "enc_type": "PER_CHANNEL" if one.parameter else "PER_TENSOR",
        "is_sym": one.symmetric,
        "scale": one.scale,
        "offset": [-(one.zero_point + 128)] * len(one.scale),
    }


def _version_2(one: Encoding) -> dict[str, Any]:
    if one.parameter:
        return {"name": one.name, "output_dtype": "int8", "y_scale": one.scale, "axis": one.axis}
    return {"name": one.name, "output_dtype": "int8", "y_scale": one.scale[0], "y_zero_point": one.zero_point}
