# SPDX-License-Identifier: Apache-2.0
"""The ablation table of a search for cures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from calib.report.terminal import terminal

if TYPE_CHECKING:
    from calib.cures.result import Cured

__all__ = ["print_cures"]

_PREFIX = "a consumer must put the prefix in front of every sequence, best as cached keys and values in float"
_OPERATION = {
    "rotate": "a consumer must rotate these inputs: config.json says so (transform_config), which vLLM computes on "
    "CUDA, and transformers up to 5.23 ignores, so that it loads and computes something else",
    "scale": "a consumer must multiply these inputs: graphs hold that (`calib export --to onnx-qdq` or openvino)",
}


def print_cures(cured: Cured) -> None:
    """What each step bought, on held-out blocks that no decision has seen; what was chosen; what consumers must do."""
    console = terminal()
    predicts = any(row.ratio is not None for row in cured.rows)
    table = Table(title="cures, verified on blocks that the search has not seen (90 % interval over blocks)")
    for column in ("cures", "KL to float, nats" if predicts else "relative error", "perplexity / float", "seconds"):
        table.add_column(column, justify="left" if column == "cures" else "right")
    for row in cured.rows:
        name = f"[bold]as written: {escape(row.name)}[/]" if row is cured.rows[-1] else escape(row.name)
        table.add_row(name, str(row.divergence), "" if row.ratio is None else str(row.ratio), f"{row.seconds:.0f}")
    console.print(table)
    for what, why in list(cured.skipped.items())[:5]:
        console.print(f"left alone: {escape(what)}: {escape(why)}")
    for record in cured.scales.cures:
        console.print(f"cure {record.kind}: {escape(record.summary)}")
        if record.needs != "nothing":
            needed = _PREFIX if record.needs == "prefix" else _OPERATION[record.kind]
            console.print(f"[yellow]note[/] {needed}")
    console.print(f"[bold]{escape(cured.reason)}[/]")
