# SPDX-License-Identifier: Apache-2.0
"""Runs in Optimum's own environment: its quantizer with a calibration table; imports nothing of calib.

`python optimum_run.py FOLDER FEED.npz OUT`: `ORTQuantizer.quantize` of `FOLDER/model.onnx`, symmetric int8 inputs of
matrix products, into `OUT/model_quantized.onnx`. Inputs have the ranges of `FOLDER/calibration.json`. Optimum rounds
the outputs of products too and insists on ranges for them: those are calibrated here, on one feed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    folder, feed, out = map(Path, sys.argv[1:4])
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantizationMode, QuantType
    from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import QuantizationConfig

    table = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["data"]
    ends = {
        name: tuple(np.array(one[end]["data"], one[end]["dtype"]) for end in ("lowest", "highest"))
        for name, one in table.items()
    }
    settings = QuantizationConfig(
        is_static=True,
        format=QuantFormat.QDQ,
        mode=QuantizationMode.QLinearOps,
        activations_dtype=QuantType.QInt8,
        activations_symmetric=True,
        weights_dtype=QuantType.QInt8,
        weights_symmetric=True,
        per_channel=False,
        operators_to_quantize=["MatMul"],
        nodes_to_quantize=products(folder / "model.onnx", set(ends)),
    )
    calibrator = create_calibrator(folder / "model.onnx", ["MatMul"], str(out.with_suffix(".augmented.onnx")))
    calibrator.collect_data(Feed(dict(np.load(feed))))
    others = {name: one.range_value for name, one in calibrator.compute_data().items() if name not in ends}
    ranges = TensorsData(CalibrationMethod.MinMax, {**others, **ends})
    quantizer = ORTQuantizer.from_pretrained(folder, file_name="model.onnx")
    quantizer.quantize(settings, save_dir=out, calibration_tensors_range=ranges)


class Feed:
    """One batch, as ONNX Runtime's calibrator asks for it."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self.left = [inputs]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def products(path: Path, inputs: set[str]) -> list[str]:
    """Multiplications of a tensor of the table by a weight."""
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and node.input[0] in inputs and node.input[1] in weights
    ]


if __name__ == "__main__":
    main()
