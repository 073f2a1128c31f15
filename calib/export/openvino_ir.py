# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's own files (`model.xml`, `model.bin`), converted from the Q/DQ graph, which OpenVINO also reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from calib.export.checkpoint import copy_companions, read_config, write_config
from calib.export.formats import register
from calib.export.onnx_graph import save_onnx
from calib.export.onnx_qdq import quantized_graph
from calib.export.request import ExportRequest, ExportSummary

__all__ = ["FILE", "export_openvino"]

FILE = "model.xml"


@register(
    "openvino",
    summary="OpenVINO IR, converted from onnx-qdq",
    carries="weights, input scales and zero points",
    consumers=("OpenVINO",),
    proven="OpenVINO, executing integers",
    cures=("smooth", "rotate", "scale", "keep", "clip", "compensate"),
    model=True,
    extra="openvino",
)
def export_openvino(request: ExportRequest) -> ExportSummary:
    """Writes `model.xml`, `model.bin`, configuration and tokenizer.

    Raises:
        UsageError: the scales are not 8-bit.
        ModelError: the model cannot be exported, or no layer has a scale.
    """
    import openvino

    model, summary = quantized_graph(request)
    with tempfile.TemporaryDirectory(prefix="calib-openvino-") as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        # weights would be stored in float16 by default, and scales with them
        openvino.save_model(openvino.Core().read_model(str(path)), str(request.folder / FILE), compress_to_fp16=False)
    write_config(read_config(request.opened), request.folder)
    copy_companions(request.opened, request.folder)
    return summary
