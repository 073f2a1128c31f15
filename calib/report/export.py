# SPDX-License-Identifier: Apache-2.0
"""Prints the list of formats, what an export wrote, and what a check of it found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from calib.export import FORMATS, ExportSummary, Verification
from calib.export.report import ConsumerReport
from calib.schema.scales import ScaleFile

__all__ = ["formats_table", "print_comparison", "print_export", "print_formats", "print_verification"]

_SHOWN = 20


def formats_table() -> list[dict[str, Any]]:
    """One row per format, without its writer."""
    rows = []
    for _, found in sorted(FORMATS.items()):
        row = {key: value for key, value in vars(found).items() if key != "write"}
        rows.append({key: list(value) if isinstance(value, tuple) else value for key, value in row.items()})
    return rows


def print_formats(*, as_json: bool) -> None:
    """All formats."""
    if as_json:
        click.echo(json.dumps(formats_table(), indent=2))
        return
    for row in formats_table():
        variants = f" [{', '.join(row['variants'])}]" if row["variants"] else ""
        click.echo(f"{row['name']}{variants}: {row['summary']}")
        click.echo(f"    carries   {row['carries']}")
        click.echo(f"    cures     {', '.join(row['cures'])}")
        click.echo(f"    read by   {', '.join(row['consumers'])}; tested with {row['proven']}")
        needs = [what for what in ("model", "measurement") if row[what]]
        needs += [f"pip install 'calib[{row['extra']}]'"] if row["extra"] else []
        if needs:
            click.echo(f"    needs     {', '.join(needs)}")


def print_export(summary: ExportSummary, folder: Path, *, as_json: bool) -> None:
    """What was written, and what was left out and why."""
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **asdict(summary)}, indent=2))
        return
    kv = f", keys and values of {len(summary.kv_cache)} attention layers" if summary.kv_cache else ""
    click.echo(f"{len(summary.quantized)} with a scale{kv}, {len(summary.in_float)} in floating point")
    for name, reason in list(summary.in_float.items())[:_SHOWN]:
        click.echo(f"  {name}: {reason}")
    if len(summary.in_float) > _SHOWN:
        click.echo(f"  and {len(summary.in_float) - _SHOWN} more, see calib_export.json")
    for note in summary.notes:
        click.echo(f"note: {note}")
    click.echo(f"wrote {folder}")


def print_comparison(published: ScaleFile, own: ScaleFile) -> None:
    """Linear inputs, keys and values that both have, where their ranges differ most first."""
    readers = {reader: tensor for name, tensor in own.tensors.items() for reader in [name, *tensor.shared_with]}
    rows = []
    for name, theirs in published.tensors.items():
        ours = readers.get(name)
        if ours is None or theirs.kind == "weight":
            continue
        first, second = (max(abs(t.range_min), abs(t.range_max)) for t in (theirs, ours))
        rows.append((first / second, name, first, second))
    rows.sort(key=lambda row: max(row[0], 1 / row[0]), reverse=True)
    click.echo(f"{len(rows)} tensors in both; published range / own range, most different first")
    for ratio, name, first, second in rows[:_SHOWN]:
        click.echo(f"  {ratio:8.3f}  {first:12.6g}  {second:12.6g}  {name}")


def print_verification(found: Verification, *, as_json: bool) -> None:
    """Counts first, then each problem."""
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    missing = found.scales - found.scales_read
    click.echo(f"{found.format}: {found.scales_read} of {found.scales} scales read, {missing} missing or unusable")
    if found.consumer is not None:
        _print_consumer(found.consumer)
    for line in found.not_checked:
        click.echo(f"not checked: {line}")
    for line in found.problems[:_SHOWN]:
        click.echo(f"problem: {line}")
    if len(found.problems) > _SHOWN:
        click.echo(f"and {len(found.problems) - _SHOWN} more problems; --json lists all")
    click.echo("passed" if found.passed else "failed")


def _print_consumer(report: ConsumerReport) -> None:
    defaulted = report.scales - report.scales_read
    click.echo(f"{report.consumer}: {report.scales_read} of {report.scales} scales read, {defaulted} defaulted")
    click.echo(
        f"  single layers: {report.layers_exact} of {report.layers} equal, largest difference "
        f"{report.layer_difference:.3g}; whole model: {report.model_difference:.3g}, allowed {report.allowance:g}"
    )
    if report.integer_layers is None:
        click.echo("  no integer kernels: this consumer multiplies rounded values in floating point")
    else:
        click.echo(f"  {report.integer_layers} of {report.layers} layers run in integer kernels")
    if report.speed is not None:
        click.echo(f"  {report.speed:.2f}x the speed of the float model")
