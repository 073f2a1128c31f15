# SPDX-License-Identifier: Apache-2.0
"""Which layers of a Q/DQ graph ONNX Runtime multiplies in integers, read from the graph that it optimised."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

__all__ = ["INTEGER_OPERATORS", "integer_layers", "session"]

INTEGER_OPERATORS = {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearConv"}
_ERROR = 3


def session(model: Path | bytes, *, threads: int = 0, optimised: Path | None = None, plain: bool = False) -> Any:
    """An inference session on the CPU.

    Args:
        model: file, or a serialised graph.
        threads: of one operator; 0 lets the runtime choose.
        optimised: where to write the optimised graph.
        plain: without any optimisation: every node as it stands, Q and DQ in float.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
        )
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def integer_layers(path: Path) -> list[str]:
    """Modules whose weight an integer operator of the optimised graph reads.

    A module that is called several times counts if every call does.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="calib-onnx-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        session(path, optimised=optimised)
        graph = onnx.load(optimised, load_external_data=False).graph
    calls: dict[str, list[bool]] = {}
    for node in graph.node:
        for name in node.input:
            if name.endswith("/weight_quantized"):
                module = name.removesuffix("/weight_quantized").partition("#")[0]
                calls.setdefault(module, []).append(node.op_type in INTEGER_OPERATORS)
    return [module for module, found in calls.items() if all(found)]
