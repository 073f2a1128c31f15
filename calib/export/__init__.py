# SPDX-License-Identifier: Apache-2.0
"""Writes scales in the formats that deployment stacks read, one file each, and checks what was written."""

from __future__ import annotations

# isort: off - the order is that of `calib formats`
from calib.export import (  # noqa: F401  # noqa: F401  # noqa: F401
    aimet,
    check_compressed_tensors,
    check_onnx,
    check_tables,
    check_torchao,
    compressed_tensors,
    csv_table,
    imatrix,
    modelopt,
    onnx_qdq,
    openvino_ir,
    ort_calibration,
    quark,
    sglang_kv,
    smoothquant,
    torchao,
)

# isort: on
from calib.export.compressed_tensors import CheckpointSummary, write_checkpoint
from calib.export.formats import FORMATS, Format
from calib.export.report import ConsumerReport, Verification
from calib.export.request import ExportSummary
from calib.export.verify import verify_export
from calib.export.write import export_scales

__all__ = [
    "FORMATS",
    "CheckpointSummary",
    "ConsumerReport",
    "ExportSummary",
    "Format",
    "Verification",
    "export_scales",
    "verify_export",
    "write_checkpoint",
]
