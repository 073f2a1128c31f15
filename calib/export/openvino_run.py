# SPDX-License-Identifier: Apache-2.0
"""Compiles a graph in OpenVINO for the CPU, and counts the products that it runs in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["compiled", "integer_products"]


def compiled(model: Path | bytes) -> Any:
    """A compiled model on one thread; what is not quantized stays in float32, which OpenVINO would else lower."""
    import openvino

    core = openvino.Core()
    read = core.read_model(str(model) if isinstance(model, Path) else model)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(read, "CPU", settings)


def integer_products(model: Any) -> int:
    """Matrix products whose kernel takes int8, in the graph that is executed."""
    found = 0
    for node in model.get_runtime_model().get_ops():
        kind = str(node.get_rt_info()["layerType"].astype(str)) if "layerType" in node.get_rt_info() else ""
        kernel = str(node.get_rt_info()["primitiveType"].astype(str)) if "primitiveType" in node.get_rt_info() else ""
        found += kind in ("FullyConnected", "MatMul") and kernel.lower().endswith(("i8", "u8"))
    return found
