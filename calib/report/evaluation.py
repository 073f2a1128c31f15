# SPDX-License-Identifier: Apache-2.0
"""Prints an evaluation: a row per form of the model, and the tensors with the largest error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calib.schema.evaluation import EvaluationFile, IntervalRecord, LayerTable

__all__ = ["print_evaluation"]

_WIDTH = 140
_SHOWN = 10


def print_evaluation(found: EvaluationFile, *, as_json: bool) -> None:
    """Tables, or the whole record on one line."""
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    corpus = found.corpus
    console.print(
        f"[bold]{escape(found.model.name)}[/]  {found.model.architecture}, {found.model.dtype}; "
        f"{corpus.blocks} blocks of {corpus.max_length} tokens; {found.bits} bits; 90 % intervals over blocks"
    )
    console.print(_rows(found))
    if found.layers is not None:
        _print_layers(console, found.layers)
    silent = sorted({name for row in found.rows for name in row.silent})
    if silent:
        console.print(f"[red]never reached[/], so not rounded: {escape(', '.join(silent[:_SHOWN]))}")
    for note in found.notes:
        console.print(f"note: {escape(note)}")


def _rows(found: EvaluationFile) -> Table:
    language = any(row.perplexity is not None for row in found.rows)
    table = Table()
    table.add_column("model")
    names = ("perplexity", "ratio to float", "KL to float", "same top token") if language else ()
    for name in names or ("cosine to float", "same top", "SQNR dB"):
        table.add_column(name, justify="right")
    for row in found.rows:
        if language:
            perplexity = "" if row.perplexity is None else f"{row.perplexity:,.3f}"
            table.add_row(row.label, perplexity, _interval(row.ratio), _interval(row.kl), _interval(row.top1))
        else:
            sqnr = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
            table.add_row(row.label, _interval(row.cosine, 5), _interval(row.top1), sqnr)
    return table


def _print_layers(console: Console, layers: LayerTable) -> None:
    table = Table(title=f"largest error inside of the running model, {layers.label}, {layers.blocks} blocks")
    table.add_column("tensor")
    for name in ("SQNR dB", "rel. MAE", "its own rounding dB", "expected dB", "zeroed"):
        table.add_column(name, justify="right")
    tensors = {tensor.name: tensor for tensor in layers.tensors}
    for name in layers.worst:
        tensor = tensors[name]
        table.add_row(
            escape(name),
            _number(tensor.running_sqnr_db, ".1f"),
            _number(tensor.running_rel_mae, ".3f"),
            _number(tensor.isolated_sqnr_db, ".1f"),
            _number(tensor.expected_sqnr_db, ".1f"),
            _number(tensor.isolated_zeroed, ".1%"),
        )
    console.print(table)
    if layers.median_difference_db is None:
        return
    compared = sum(tensor.difference_db is not None for tensor in layers.tensors)
    console.print(
        f"rounding alone against what the scale file expects: median difference {layers.median_difference_db:.2f} dB "
        f"over {compared} tensors, {len(layers.beyond_limit)} beyond {layers.limit_db} dB"
    )
    for name in layers.beyond_limit[:_SHOWN]:
        console.print(f"  {escape(name)}: {_number(tensors[name].difference_db, '+.2f')} dB")
    if len(layers.beyond_limit) > _SHOWN:
        console.print(f"  and {len(layers.beyond_limit) - _SHOWN} more; --json lists all")


def _interval(found: IntervalRecord | None, digits: int = 4) -> str:
    # rich reads square brackets as marks
    return "" if found is None else f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
