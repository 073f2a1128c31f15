# SPDX-License-Identifier: Apache-2.0
"""One row per tensor: for spreadsheets, and for whoever reads scales with ten lines of their own."""

from __future__ import annotations

import csv
from typing import Any

from calib.export.formats import register
from calib.export.request import ExportRequest, ExportSummary
from calib.schema.scales import TensorScale

__all__ = ["COLUMNS", "FILE", "export_csv"]

FILE = "scales.csv"
COLUMNS = (
    "name", "kind", "bits", "symmetric", "granularity", "min", "max", "range_min", "range_max", "scale", "zero_point",
    "qmin", "qmax", "verdict",
)  # fmt: skip


@register(
    "csv",
    summary="one row per tensor and name",
    carries="ranges, scales, zero points, verdicts of every tensor",
    consumers=("spreadsheets", "pandas"),
    proven="Python's csv reader",
    cures=("smooth", "rotate", "keep", "clip", "prefix"),
)
def export_csv(request: ExportRequest) -> ExportSummary:
    """Writes `scales.csv`. A tensor that several modules read has a row under each name; a list is joined by spaces."""
    named = [(name, t) for canonical, t in request.scales.tensors.items() for name in [canonical, *t.shared_with]]
    rows = [_row(name, tensor) for name, tensor in named]
    with (request.folder / FILE).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return ExportSummary([name for name, _ in named], dict(request.scales.left_out))


def _row(name: str, tensor: TensorScale) -> list[Any]:
    scheme = tensor.scheme
    return [
        *(name, tensor.kind, scheme.bits, scheme.symmetric, scheme.granularity),
        *(tensor.min, tensor.max, tensor.range_min, tensor.range_max),
        *(_joined(tensor.scale), _joined(tensor.zero_point), tensor.qmin, tensor.qmax, tensor.verdict),
    ]


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
