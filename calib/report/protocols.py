# SPDX-License-Identifier: Apache-2.0
"""Tables of the published protocols: the measured model among the published checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from calib.protocols.int8_sanity import Sanity
from calib.protocols.max_activations import Comparison
from calib.protocols.published import SOURCE, SanityRow
from calib.protocols.rows import FLOAT16_MAX, CheckpointMaximum
from calib.report.terminal import terminal

__all__ = ["print_maxima", "print_sanity"]

_MISSING_SHOWN = 5


def print_maxima(comparison: Comparison, *, as_json: bool) -> None:
    """M of the measured model and of the published checkpoints, largest first."""
    if as_json:
        _print_json(
            {
                "format": "calib.max-activations",
                "source": SOURCE,
                "rank": comparison.rank,
                "measured": _maximum_record(comparison.measured),
                "missing_sites": comparison.missing,
                "published": [_maximum_record(one) for one in comparison.published],
            }
        )
        return
    console = terminal()
    measured = comparison.measured
    table = Table(title=f"largest activation beside {len(comparison.published)} published checkpoints ({SOURCE})")
    for column in ("rank", "checkpoint", "family", "layers", "M", "at", "M / rms", "M / q0.999", "massive", "float16"):
        table.add_column(column, justify="left" if column in ("checkpoint", "family", "at") else "right")
    for one in comparison.ranked:
        mine = one is measured
        table.add_row(
            str(1 + sum(m.magnitude > one.magnitude for m in comparison.ranked)),
            escape(one.checkpoint),
            escape(one.family),
            str(one.num_hidden_layers),
            f"{one.value:+,.6g}",
            escape(one.site),
            _number(one.crest),
            _number(one.over_q999),
            "?" if one.massive_tokens is None else f"{one.massive_tokens:,}",
            "overflows" if one.overflows_float16 else "fits",
            style="bold reverse" if mine else "",
        )
    console.print(table)
    console.print(
        f"[bold]{escape(measured.checkpoint)}[/]: M {measured.value:+,.6g} at {escape(measured.site)}, "
        f"rank {comparison.rank} of {len(comparison.ranked)}; "
        + ", ".join(f"{kind} {value:,.6g}" for kind, value in measured.by_kind.items())
    )
    console.print(
        f"massive: tokens with max > 100 and max > 1,000 medians, summed over block outputs. "
        f"float16 ends at {FLOAT16_MAX:,.0f}. Published M: 5,000 texts, no BOS, bfloat16; texts differ, so do M"
    )
    if comparison.missing:
        shown = ", ".join(comparison.missing[:_MISSING_SHOWN])
        more = len(comparison.missing) - _MISSING_SHOWN
        console.print(f"[yellow]not measured[/]: {shown}" + (f" and {more} more" if more > 0 else ""))


def print_sanity(sanity: Sanity, published: Sequence[SanityRow], *, as_json: bool) -> None:
    """Errors of INT8 with each threshold, the measured model first."""
    if as_json:
        _print_json(
            {
                "format": "calib.int8-sanity",
                "source": SOURCE,
                "held_out": sanity.held_out,
                "measured": [asdict(row) for row in sanity.rows],
                "published": [asdict(row) for row in published],
            }
        )
        return
    console = terminal()
    table = Table(title=f"static per-tensor INT8 at one tensor, beside the published check ({SOURCE})")
    columns = ("checkpoint", "at", "policy", "t", "SQNR dB", "body dB", "rel. MAE", "rel. RMSE", "zeroed", "clipped")
    for column in columns:
        table.add_column(column, justify="left" if column in ("checkpoint", "at", "policy") else "right")
    for number, row in enumerate([*sanity.rows, *published]):
        mine = number < len(sanity.rows)
        table.add_row(
            escape(row.checkpoint),
            escape(row.site),
            row.policy,
            f"{row.threshold:,.6g}",
            "exact" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
            ("exact" if mine else "") if row.body_sqnr_db is None else f"{row.body_sqnr_db:.2f}",
            f"{row.rel_mae:.4f}",
            f"{row.rel_rmse:.4f}",
            "" if row.zeroed is None else f"{row.zeroed:.1%}",
            f"{row.clip_rate:.3%}",
            style="bold" if mine else "",
            end_section=number == len(sanity.rows) - 1,
        )
    console.print(table)
    rows = "other rows of text than" if sanity.held_out else "the same rows of text as"
    console.print(
        f"thresholds come from {rows} the errors (published: other rows). clip_q0.999 of the published rows is the "
        "lower edge of one of 2,048 equal bins; clip_q0.999_linear is ours by that rule, clip_q0.999 the true quantile"
    )


def _maximum_record(one: CheckpointMaximum) -> dict[str, Any]:
    return {**asdict(one), "overflows_float16": one.overflows_float16}


def _print_json(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"
