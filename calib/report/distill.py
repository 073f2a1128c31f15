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
    from calib.schema.distill import DistillReport

__all__ = ["print_information", "print_report"]

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
    console.print("CMI, separation and log-likelihood in nats; every column is of the softmax at temperature T")


def print_report(report: DistillReport) -> None:
    """Teachers, students and paired gains, means over seeds."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    table = Table(title=f"teachers, mean of {len(report.recipe.seeds)} seeds (training data | test data)")
    for column in ("teacher", "lambda", "CMI", "NCMI", "log-likelihood", "accuracy", "ECE"):
        table.add_column(column, justify="left" if column == "teacher" else "right")
    for name in dict.fromkeys(row.teacher for row in report.teachers):
        rows = [row for row in report.teachers if row.teacher == name]
        strengths = sorted({row.strength for row in rows if row.strength is not None})
        cells = [
            " | ".join(_mean([getattr(row, part)[key] for row in rows], digits) for part in ("train", "test"))
            for key, digits in (("cmi", 4), ("ncmi", 5), ("log_likelihood", 4), ("accuracy", 4), ("ece", 4))
        ]
        table.add_row(name, ", ".join(f"{s:g}" for s in strengths), *cells)
    console.print(table)
    zero_shot = report.recipe.protocol.kind == "zero-shot"
    columns = [
        "condition",
        "samples",
        "student by",
        *(["omitted recall", "kept accuracy"] if zero_shot else ["accuracy"]),
    ]
    table = Table(title="students, test data after the last step, mean over seeds")
    for column in columns:
        table.add_column(column, justify="left" if column in ("condition", "student by") else "right")
    for condition, framework, teacher in dict.fromkeys((r.condition, r.framework, r.teacher) for r in report.students):
        found = [r for r in report.students if (r.condition, r.framework, r.teacher) == (condition, framework, teacher)]
        keys = ("omitted_recall", "kept_accuracy") if zero_shot else ("accuracy",)
        label = framework if teacher == "none" else f"{framework} of {teacher}"
        table.add_row(
            escape(condition), str(found[0].samples), label, *(_mean([getattr(r, k) for r in found], 4) for k in keys)
        )
    console.print(table)
    for gain in report.gains:
        spread = "" if gain.standard_error is None else f" +- {gain.standard_error:.4f} s.e."
        console.print(
            f"{escape(gain.condition)}, {gain.framework}: MCMI against {gain.against} {gain.mean:+.4f}{spread}, "
            f"better in {gain.wins} of {gain.seeds}"
        )
    if report.covered_area:
        console.print("covered area " + ", ".join(f"{name} {area:.1%}" for name, area in report.covered_area.items()))
    for warning in report.warnings:
        console.print(f"[yellow]note[/] {escape(warning)}")


def _mean(values: Sequence[float | int | bool | None], digits: int) -> str:
    known = [float(value) for value in values if value is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else ""
