# SPDX-License-Identifier: Apache-2.0
"""Ranges for whoever keeps ONNX Runtime's own quantizer: a calibration table, and per-tensor overrides.

`calibration.json` is what `write_calibration_table` writes and the TensorRT execution provider reads. `overrides.json`
goes into `extra_options={"TensorQuantOverrides": ...}` of `quantize_static` after `ort_overrides` made its numbers
numpy arrays, which that function insists on. Optimum's `ORTQuantizer.quantize(calibration_tensors_range=...)` takes the
same ranges; it rounds the outputs of products too, whose ranges it must calibrate itself. Names are those of the float
`model.onnx` beside them.
Source: onnxruntime 1.32, `quantization/quant_utils.py` and `quantization/calibrate.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import ArtifactError, UsageError
from calib.export.formats import register
from calib.export.linears import LinearRange, linear_ranges
from calib.export.onnx_graph import float_graph, save_onnx
from calib.export.request import ExportRequest, ExportSummary

__all__ = ["GRAPH", "OVERRIDES", "TABLE", "export_ort_calibration", "ort_overrides", "tensor_ranges"]

GRAPH, TABLE, OVERRIDES = "model.onnx", "calibration.json", "overrides.json"


@register(
    "ort-calibration",
    summary="float ONNX graph, calibration table and TensorQuantOverrides for ONNX Runtime's quantizer",
    carries="input ranges and scales, names of the graph",
    consumers=("onnxruntime.quantization", "Optimum ORTQuantizer", "TensorRT execution provider"),
    proven="quantize_static, Optimum",
    model=True,
    extra="onnx",
)
def export_ort_calibration(request: ExportRequest) -> ExportSummary:
    """Writes `model.onnx`, `calibration.json` and `overrides.json`.

    Raises:
        UsageError: the scales are not 8-bit.
        ModelError: the model cannot be exported, or no layer has a scale.
    """
    if request.scales.bits != 8:
        raise UsageError(f"ort-calibration: --bits {request.scales.bits} is not written here; only 8 is")
    linears = linear_ranges(request.scales, request.opened.model, fused=False, conv1d=True)
    found = float_graph(request.opened)
    aliases: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for product in found.products:
        if product.module not in linears.ranges:
            continue
        call = calls[product.module]
        calls[product.module] += 1
        aliases[f"{product.module}:input{f'#{call}' if call else ''}"] = product.source
    ranges = tensor_ranges(aliases, linears.ranges)
    save_onnx(found.model, request.folder / GRAPH)
    table = {
        "CLS": "TensorsData",
        "data": {
            name: {"lowest": _number(r.low), "highest": _number(r.high), "CLS": "TensorData"}
            for name, r in ranges.items()
        },
        "calibration_method": {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"},
    }
    overrides = {name: {"quant_type": "QInt8", "scale": r.grid()[0], "zero_point": r.grid()[1]}
                 for name, r in ranges.items()}  # fmt: skip
    for file, content in ((TABLE, table), (OVERRIDES, overrides)):
        (request.folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lost = {
        name: "the exported graph does not hold it as one matrix product"
        for name in linears.ranges
        if f"{name}:input" not in aliases
    }
    quantized = [name for name in linears.ranges if name not in lost]
    return ExportSummary(quantized, {**linears.in_float, **lost}, [], list(linears.notes), {"onnx": aliases})


def tensor_ranges(aliases: Mapping[str, str], ranges: Mapping[str, LinearRange]) -> dict[str, LinearRange]:
    """By tensor of the graph, the range that covers all layers that read it.

    Args:
        aliases: input of a layer, or of a later call of it (``module:input#1``) -> name of the tensor.
        ranges: by layer.
    """
    found: dict[str, LinearRange] = {}
    for name, source in aliases.items():
        wanted = ranges.get(name.partition(":")[0])
        if wanted is None:
            continue
        held = found.get(source, wanted)
        low, high = min(held.low, wanted.low), max(held.high, wanted.high)
        found[source] = LinearRange(source, low, high, held.symmetric and wanted.symmetric)
    return found


def ort_overrides(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The overrides of a folder, as `quantize_static` takes them.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    from onnxruntime.quantization import QuantType

    path = folder / OVERRIDES
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: [
                {
                    "quant_type": QuantType[one["quant_type"]],
                    "scale": np.array(one["scale"], np.float32),
                    "zero_point": np.array(one["zero_point"], np.int8),
                }
            ]
            for name, one in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path}: is missing or damaged; export again") from None


def _number(value: float) -> dict[str, Any]:
    """A float32 array of no dimension, as ONNX Runtime's encoder writes it."""
    return {"data": value, "dtype": "float32", "CLS": "numpy.array"}
