# SPDX-License-Identifier: Apache-2.0
"""Tables of distillation for the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from calib.distill.information import InformationSummary

__all__ = ["print_information"]

_WIDTH = 140


def print_information(name: str, data: str, found: Sequence[InformationSummary], *, as_json: bool) -> None:
    """CMI and what belongs to it, one row per temperature."""
    if as_json:
        record = {"model": name, "data": data, "information": [summary.to_dict() for summary in found]}
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    first = found[0]
    absent = f", {first.absent_classes} of them without a sample" if first.absent_classes else ""
    console.print(
        f"[bold]{escape(name)}[/] on {escape(data)}: {first.samples:,} samples, {first.classes} classes{absent}"
    )
    table = Table()
    for column in ("T", "CMI", "separation", "NCMI", "log-likelihood", "accuracy", "ECE"):
        table.add_column(column, justify="right")
    for summary in found:
        table.add_row(
            f"{summary.temperature:g}",
            f"{'<= ' if summary.grouped else ''}{summary.cmi:.5f}",
            "" if summary.separation is None else f"{summary.separation:.4f}",
            "" if summary.ncmi is None else f"{summary.ncmi:.6f}",
            f"{summary.log_likelihood:.4f}",
            f"{summary.accuracy:.2%}",
            f"{summary.ece:.4f}",
        )
    console.print(table)
    console.print(
        "CMI, separation and log-likelihood in nats; the last three columns are at T = 1 where T plays a part"
    )
