# SPDX-License-Identifier: Apache-2.0
"""How fast a student answers in ONNX Runtime, in float and in INT8, and how fast its teacher does."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.distill.quantized.image_graph import INPUT, integer_image_graph, tensor_graph
from calib.errors import CalibError, UsageError
from calib.models import OpenedModel
from calib.quantized import plan_from_scales
from calib.schema.distill import Latency
from calib.schema.provenance import ModelProvenance
from calib.schema.scales import ScaleFile

__all__ = ["first_input", "int8_graph", "latency_or_reason", "measure_latency", "onnx_student"]

_PAIRS = 21


def first_input(batch: Any) -> dict[str, Any]:
    """The first sample of a batch, as ONNX Runtime takes it, by the names of the graph's inputs.

    Args:
        batch: a mapping with `input_ids` and `attention_mask` or with one other input, or a sequence whose first part
            is the inputs.
    """
    if isinstance(batch, Mapping):
        if "input_ids" in batch:
            return {name: batch[name][:1].numpy() for name in ("input_ids", "attention_mask")}
        name = next(name for name in batch if name not in ("attention_mask", "labels", "index"))
        return {INPUT: batch[name][:1].numpy()}
    return {INPUT: batch[0][:1].numpy()}


def onnx_student(model: nn.Module, provenance: ModelProvenance) -> OpenedModel:
    """A classifier of token ids as the exporters take it."""
    return OpenedModel(model.eval(), None, None, "text-classification", provenance, Path())


def int8_graph(opened: OpenedModel, scales: ScaleFile, path: Path) -> list[str]:
    """Writes the Q/DQ graph of a model of token ids; returns the layers that ONNX Runtime multiplies in integers.

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
    student: nn.Module,
    scales: ScaleFile,
    feed: dict[str, Any],
    *,
    teacher: nn.Module | None = None,
    threads: int = 1,
    pairs: int = _PAIRS,
) -> Latency:
    """Alternating runs of the student's float graph, as torch exports it, its INT8 graph, and the teacher's float one.

    Args:
        student: on any device.
        scales: 8-bit.
        feed: one input, from `first_input`.
        teacher: reads the same input.
        threads: of an operator.
        pairs: of runs that count; two before them do not.

    Raises:
        UsageError: the packages for ONNX are not installed.
        ModelError: a model cannot be exported, or nothing of the student can be quantized.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("latency: needs ONNX Runtime; pip install 'calib[onnx]'") from error
    from calib.export.onnx_graph import save_onnx
    from calib.export.onnx_lint import integer_layers, session

    with tempfile.TemporaryDirectory(prefix="calib-latency-") as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("float", "int8", "teacher")}
        save_onnx(_float_graph(student, scales.model, feed), paths["float"])
        if INPUT in feed:
            save_onnx(integer_image_graph(student, scales, torch.from_numpy(feed[INPUT])), paths["int8"])
            integer = integer_layers(paths["int8"])
        else:
            integer = int8_graph(_on_cpu(student, scales.model), scales, paths["int8"])
        if teacher is None:
            del paths["teacher"]
        else:
            save_onnx(_float_graph(teacher, scales.model, feed), paths["teacher"])
        times = _alternating({name: session(path, threads=threads) for name, path in paths.items()}, feed, pairs)
    medians = {name: round(1000 * statistics.median(found), 3) for name, found in times.items()}
    ratios = [a / b for a, b in zip(times["float"], times["int8"], strict=True)]
    return Latency(
        teacher_ms=medians.get("teacher"),
        float_ms=medians["float"],
        int8_ms=medians["int8"],
        speedup=round(statistics.median(ratios), 3),
        integer_layers=len(integer),
        layers=len(plan_from_scales(student, inputs="none").weights),
    )


def latency_or_reason(
    student: nn.Module, scales: ScaleFile, feed: dict[str, Any], teacher: nn.Module | None = None
) -> tuple[Latency | None, str | None]:
    """The latency, or why it cannot be had."""
    try:
        return measure_latency(student, scales, feed, teacher=teacher), None
    except CalibError as error:
        return None, str(error)


def _float_graph(model: nn.Module, provenance: ModelProvenance, feed: dict[str, Any]) -> Any:
    from calib.export.onnx_graph import float_graph

    if INPUT in feed:
        return tensor_graph(model, torch.from_numpy(feed[INPUT]), provenance.name)
    return float_graph(_on_cpu(model, provenance)).model


def _on_cpu(model: nn.Module, provenance: ModelProvenance) -> OpenedModel:
    return onnx_student(copy.deepcopy(model).cpu(), provenance)


def _alternating(sessions: dict[str, Any], feed: dict[str, Any], pairs: int) -> dict[str, list[float]]:
    """Seconds of each run."""
    inputs = {name: np.ascontiguousarray(values) for name, values in feed.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(-2, pairs):
        for name, run in sessions.items():
            begin = time.perf_counter()
            run.run(None, inputs)
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
    return times
