# SPDX-License-Identifier: Apache-2.0
"""How fast a student answers in ONNX Runtime, in float and in INT8."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from calib.errors import CalibError, UsageError
from calib.models import OpenedModel
from calib.schema.distill import Latency
from calib.schema.provenance import ModelProvenance
from calib.schema.scales import ScaleFile

__all__ = ["int8_graph", "latency_or_reason", "measure_latency", "onnx_student"]

_PAIRS = 21


def onnx_student(model: nn.Module, provenance: ModelProvenance) -> OpenedModel:
    """A classifier of token ids as the exporters take it."""
    return OpenedModel(model.eval(), None, None, "text-classification", provenance, Path())


def int8_graph(opened: OpenedModel, scales: ScaleFile, path: Path) -> list[str]:
    """Writes the student's Q/DQ graph; returns the layers that ONNX Runtime multiplies in integers.

    Raises:
        ModelError: it cannot be exported.
    """
    from calib.export.onnx_graph import save_onnx
    from calib.export.onnx_lint import integer_layers
    from calib.export.onnx_qdq import quantized_graph
    from calib.export.request import ExportRequest

    graph, _ = quantized_graph(ExportRequest(scales, path.parent, opened))
    save_onnx(graph, path)
    return integer_layers(path)


def measure_latency(
    opened: OpenedModel, scales: ScaleFile, feed: dict[str, Any], *, threads: int = 1, pairs: int = _PAIRS
) -> Latency:
    """Alternating runs of the float graph, as torch exports it, and of the INT8 graph.

    Args:
        opened: from `onnx_student`.
        scales: 8-bit.
        feed: `input_ids` and `attention_mask`, int64 `[n, t]`.
        threads: of an operator.
        pairs: of runs that count; two before them do not.

    Raises:
        UsageError: the packages for ONNX are not installed.
        ModelError: the model cannot be exported.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("latency: needs ONNX Runtime; pip install 'calib[onnx]'") from error
    from calib.export.onnx_graph import float_graph, save_onnx
    from calib.export.onnx_lint import session

    with tempfile.TemporaryDirectory(prefix="calib-latency-") as folder:
        paths = [Path(folder) / "float.onnx", Path(folder) / "int8.onnx"]
        save_onnx(float_graph(opened).model, paths[0])
        integer = int8_graph(opened, scales, paths[1])
        runs = [session(path, threads=threads) for path in paths]
        inputs = {name: np.ascontiguousarray(values) for name, values in feed.items()}
        times: list[list[float]] = [[], []]
        for number in range(-2, pairs):
            for held, run in zip(times, runs, strict=True):
                begin = time.perf_counter()
                run.run(None, inputs)
                if number >= 0:
                    held.append(time.perf_counter() - begin)
    layers = sum(name.endswith(":weight") for name in scales.tensors)
    return Latency(
        float_ms=round(1000 * statistics.median(times[0]), 3),
        int8_ms=round(1000 * statistics.median(times[1]), 3),
        speedup=round(statistics.median(a / b for a, b in zip(*times, strict=True)), 3),
        integer_layers=len(integer),
        layers=layers,
    )


def latency_or_reason(
    opened: OpenedModel, scales: ScaleFile, feed: dict[str, Any] | None
) -> tuple[Latency | None, str | None]:
    """The latency, or why it cannot be had."""
    if feed is None:
        return None, "only models of token ids are exported to ONNX"
    try:
        return measure_latency(opened, scales, feed), None
    except CalibError as error:
        return None, str(error)
