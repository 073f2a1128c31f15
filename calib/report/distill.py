# SPDX-License-Identifier: Apache-2.0
"""Tables of distillation for the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from calib.distill.information import InformationSummary
    from calib.schema.distill import DistillReport, StudentRow

__all__ = ["by_seed", "deployment_cells", "print_information", "print_report", "student_label", "temperature_curves"]

_WIDTH = 160


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
        f"[bold]{escape(name)}[/] on {escape(data)}: {first.samples:,} samples, {first.classes} classes{absent}",
        soft_wrap=True,
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
    for teacher, curve in temperature_curves(report).items():
        console.print(f"CMI of {teacher}, training data: " + ", ".join(f"{cmi:.4f} at T {t:g}" for t, cmi in curve))
    zero_shot = report.recipe.protocol.kind == "zero-shot"
    language = report.recipe.task == "text-generation"
    columns = [
        "condition",
        "samples",
        "student by",
        *(["omitted recall", "kept accuracy"] if zero_shot else ["accuracy"]),
        *(["perplexity"] if language else []),
    ]
    table = Table(title="students, test data after the last step, mean over seeds")
    for column in columns:
        table.add_column(column, justify="left" if column in ("condition", "student by") else "right")
    several = report.recipe.student.quantization is not None
    for group in by_seed(report.students):
        keys = ("omitted_recall", "kept_accuracy") if zero_shot else ("accuracy",)
        first = group[0]
        means = [_mean([getattr(row, key) for row in group], 4) for key in keys]
        means += [f"{mean_perplexity(group):.2f}"] if language else []
        table.add_row(escape(first.condition), str(first.samples), student_label(first, variant=several), *means)
    console.print(table)
    if several:
        console.print(_deployments(report))
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


def student_label(row: StudentRow, *, variant: bool) -> str:
    """How a student was trained, in words."""
    label = row.framework if row.teacher == "none" else f"{row.framework} of {row.teacher}"
    return f"{label}, {row.variant}" if variant else label


def mean_perplexity(rows: Sequence[StudentRow]) -> float:
    """Of language models, from the mean log-likelihood over seeds."""
    return math.exp(-sum(row.log_likelihood or 0.0 for row in rows) / len(rows))


def temperature_curves(report: DistillReport) -> dict[str, list[tuple[float, float]]]:
    """Teacher -> (temperature, CMI over the training data, mean over seeds); empty where the recipe asks for one T."""
    if len(report.recipe.temperatures) < 2:
        return {}
    found: dict[str, dict[float, list[float]]] = {}
    for row in report.teachers:
        for point in row.temperatures:
            temperature, cmi = point["temperature"] or 0.0, point["cmi"] or 0.0
            found.setdefault(row.teacher, {}).setdefault(temperature, []).append(cmi)
    return {name: [(t, sum(cmi) / len(cmi)) for t, cmi in curve.items()] for name, curve in found.items()}


def by_seed(students: Sequence[StudentRow]) -> list[list[StudentRow]]:
    """Rows that differ in their seed only, in order."""
    groups: dict[tuple[str, ...], list[StudentRow]] = {}
    for row in students:
        groups.setdefault((row.condition, row.framework, row.teacher, row.variant), []).append(row)
    return list(groups.values())


def deployment_cells(rows: Sequence[StudentRow]) -> dict[str, str]:
    """What quantization makes of a student, means over seeds, by column; a column that was not measured is empty."""
    found = [row.deployment for row in rows if row.deployment is not None]

    def accuracy(bits: int | None, scales: str) -> str:
        values = [
            row.accuracy
            for one in found
            for row in one.quantized
            if row.scales == scales and bits in (None, row.weight_bits)
        ]
        return f"{sum(values) / len(values):.2%}" if values else ""

    sizes = (found[0].float_bytes, *found[0].bytes_by_weight_bits.values())
    latencies = [one.latency for one in found if one.latency is not None]
    return {
        "worst peak / rms": _mean([one.peaks[0].peak_over_rms for one in found], 1),
        "float": f"{sum(one.accuracy for one in found) / len(found):.2%}",
        "INT8": accuracy(8, "measured"),
        "INT4 weights": accuracy(4, "measured"),
        "as trained": accuracy(None, "learned"),
        "MB: float, INT8, INT4": ", ".join(f"{size / 1e6:.2f}" for size in sizes),
        "ms: teacher, float, INT8": ", ".join(
            _mean([getattr(one, key) for one in latencies], 2) or "-"
            for key in ("teacher_ms", "float_ms", "int8_ms")
            if latencies
        ),
        "in integers": f"{latencies[0].integer_layers} of {latencies[0].layers}" if latencies else "",
    }


def _deployments(report: DistillReport) -> Table:
    table = Table(title="quantized: INT8 activations, static, per tensor; weights per row; test data, mean over seeds")
    groups = [rows for rows in by_seed(report.students) if all(row.deployment for row in rows)]
    for column in ("condition", "student by"):
        table.add_column(column)
    for column in deployment_cells(groups[0]):
        table.add_column(column, justify="right")
    for rows in groups:
        cells = deployment_cells(rows).values()
        table.add_row(escape(rows[0].condition), student_label(rows[0], variant=True), *cells)
    return table


def _mean(values: Sequence[float | int | bool | None], digits: int) -> str:
    known = [float(value) for value in values if value is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else ""
