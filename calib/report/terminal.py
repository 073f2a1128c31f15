# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal: where the peaks are, what INT8 does to them, which tensors are the worst."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.measurement.site import Site
    from calib.scales import MethodRow
    from calib.schema.provenance import CorpusProvenance
    from calib.schema.scales import ScaleFile

__all__ = ["print_json", "print_measurement", "print_scales", "print_sites", "sparkline", "terminal"]

_BARS = "▁▂▃▄▅▆▇█"
_FLOAT16_MAX, _E4M3_MAX = 65504.0, 448.0
_WORST = 10
_WIDTH = 140


def _print_experts(console: Console, sites: dict[str, Site]) -> None:
    """Tokens and peaks of experts against all other tensors."""
    from calib.measurement.gates import expert_tokens

    tokens = expert_tokens(sites)
    if not tokens:
        return
    experts = [s for s in sites.values() if s.expert is not None or ".experts." in s.name]
    peak = max(experts, key=lambda site: site.statistics.range.amax)
    rest = max((s.statistics.range.amax for s in sites.values() if s not in experts), default=0.0)
    forced = {f"{s.module}@{s.expert}" for s in experts if s.forced}
    console.print(
        f"{len(tokens)} experts, {min(tokens.values()):,} to {max(tokens.values()):,} tokens each; peak "
        f"{_number(peak.statistics.range.amax)} at {escape(peak.name)}, of all other tensors {_number(rest)}"
        + (f"; {len(forced)} measured by force" if forced else "")
    )


def _print_modalities(console: Console, sites: dict[str, Site]) -> None:
    """The largest residual stream of each modality."""
    peaks: dict[str, float] = {}
    for site in sites.values():
        for name, part in site.parts.items():
            if "residual" in site.kinds:
                peaks[name] = max(peaks.get(name, 0.0), part.range.amax)
    if peaks:
        console.print("residual peak by modality: " + ", ".join(f"{n} {_number(v)}" for n, v in sorted(peaks.items())))


def print_json(path: Path) -> None:
    """Prints a JSON file on one line."""
    sys.stdout.write(json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False) + "\n")


def _amount(corpus: CorpusProvenance) -> str:
    if corpus.layout != "examples":
        return f"{corpus.blocks} blocks, {corpus.tokens:,} tokens"
    held = {"image": "pictures", "audio": "sounds", "target": "targets"}
    parts = [f"{count} {held[kind]}" for kind, count in corpus.holds.items()]
    return f"{corpus.blocks} examples ({', '.join([*parts, f'{corpus.tokens:,} tokens'])})"


def print_measurement(measurement: Measurement, tokenizer: Any | None) -> None:
    """Global peak and its place, peaks per kind, the residual stream by layer, overflow risks, gates."""
    console = terminal()
    sites = {name: site for name, site in measurement.sites.items() if site.statistics.range.count_all}
    top = max(sites.values(), key=lambda site: site.statistics.range.amax)
    corpus = measurement.corpus
    console.print(
        f"[bold]{escape(measurement.model.name)}[/]  {measurement.model.architecture}, {measurement.run.dtype}; "
        f"{_amount(corpus)}, {len(corpus.domains)} domains; "
        f"{len(sites)} tensors, {len(measurement.weights)} weights"
    )
    console.print(f"[bold]peak {_number(top.statistics.range.amax)}[/] at {escape(top.name)}{_place(top, tokenizer)}")
    _print_kinds(console, sites)
    hidden = [s for s in sites.values() if "residual" in s.kinds and s.port == "output" and s.layer is not None]
    if hidden:
        values = [s.statistics.range.amax for s in hidden]
        console.print(
            f"residual stream by layer  {sparkline(values)}  {_number(min(values))} to {_number(max(values))}"
        )
    for name, limit in (("float16", _FLOAT16_MAX), ("FP8 E4M3 without a scale", _E4M3_MAX)):
        over = [s.name for s in sites.values() if s.statistics.range.amax > limit]
        text = (
            f"{len(over)} tensors exceed {limit:,.0f}, first {escape(over[0])}"
            if over
            else f"none exceeds {limit:,.0f}"
        )
        console.print(f"overflow of {name}: {text}")
    _print_experts(console, sites)
    _print_modalities(console, sites)
    for gate in measurement.gates:
        mark = "[green]pass[/]" if gate.passed else "[red]FAIL[/]"
        console.print(f"gate {gate.name}: {mark}  {escape(gate.detail)}")


def print_scales(scales: ScaleFile, rows: Sequence[MethodRow]) -> None:
    """Error per method, the ten worst tensors, the verdict."""
    console = terminal()
    if rows:
        table = Table(title=f"INT{scales.bits} activations, error against the measured values (median | worst tensor)")
        for column in ("method", "tensors", "SQNR dB", "body SQNR dB", "rel. MAE", "zeroed", "clipped", "too coarse"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            label = row.label + (" (estimated)" if row.estimated else "")
            table.add_row(
                label,
                str(row.tensors),
                f"{_decibel(row.median_sqnr_db)} | {_decibel(row.worst_sqnr_db)}",
                f"{_decibel(row.median_body_sqnr_db)} | {_decibel(row.worst_body_sqnr_db)}",
                f"{row.median_rel_mae:.3f} | {row.worst_rel_mae:.3f}",
                f"{row.median_zeroed:.1%} | {row.worst_zeroed:.1%}",
                f"{row.median_clipped:.2%} | {row.worst_clipped:.2%}",
                str(row.too_coarse),
            )
        console.print(table)
    known = {n: t for n, t in scales.tensors.items() if t.expected.body_sqnr_db is not None and t.kind != "weight"}
    worst = sorted(known, key=lambda n: known[n].expected.body_sqnr_db or 0.0)[:_WORST]
    table = Table(title=f"worst tensors, {scales.method}")
    for column in ("tensor", "amax", "scale", "SQNR dB", "body dB", "rel. MAE", "zeroed", "verdict"):
        table.add_column(column, justify="left" if column in ("tensor", "verdict") else "right")
    for name in worst:
        tensor, error = known[name], known[name].expected
        scale = tensor.scale if isinstance(tensor.scale, float) else None
        table.add_row(
            escape(name),
            _number(tensor.amax),
            "per channel" if scale is None else f"{scale:.4g}",
            _decibel(error.sqnr_db),
            _decibel(error.body_sqnr_db),
            "" if error.rel_mae is None else f"{error.rel_mae:.3f}",
            "" if error.zeroed is None else f"{error.zeroed:.1%}",
            tensor.verdict,
        )
    console.print(table)
    console.print(f"[bold]verdict: {scales.verdict}[/]  {escape(scales.reason)}")


def print_sites(sites: Mapping[str, Site], silent: Sequence[str], seconds: float, *, as_json: bool) -> None:
    """What would be measured, in module order, with predicted cost."""
    # histogram pages of about 40 octaves per sign, extremes and energy per channel, peaks and tables
    megabytes = sum(120e3 + 48 * site.channels + 12e3 for site in sites.values()) / 1e6
    if as_json:
        listed = [
            {"name": s.name, "kind": s.kind, "channels": s.channels, "aliases": s.aliases} for s in sites.values()
        ]
        record = {
            "sites": listed,
            "not_reached": list(silent),
            "seconds": round(seconds, 1),
            "megabytes": round(megabytes),
        }
        sys.stdout.write(json.dumps(record) + "\n")
        return
    console = terminal()
    table = Table()
    for column in ("tensor", "kind", "channels", "also known as"):
        table.add_column(column, justify="right" if column == "channels" else "left")
    for site in sites.values():
        others = [name for name in site.aliases if name != site.name]
        table.add_row(escape(site.name), site.kind, str(site.channels), escape(", ".join(others)))
    console.print(table)
    console.print(f"{len(sites)} tensors; about {seconds:.0f} s and {megabytes:.0f} MB of statistics beside the model")
    if silent:
        console.print(f"[red]never reached[/] by plain text: {escape(', '.join(silent))}")


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, on a logarithmic scale."""
    logs = [math.log10(max(value, 1e-9)) for value in values]
    low, span = min(logs), max(max(logs) - min(logs), 1e-9)
    return "".join(_BARS[round((x - low) / span * (len(_BARS) - 1))] for x in logs)


def _print_kinds(console: Console, sites: Mapping[str, Site]) -> None:
    table = Table(title="largest magnitude per kind")
    for column in ("kind", "tensors", "peak", "sink positions", "all others", "rms", "at"):
        table.add_column(column, justify="left" if column in ("kind", "at") else "right")
    for kind in sorted({kind for site in sites.values() for kind in site.kinds}):
        held = [site for site in sites.values() if kind in site.kinds]
        top = max(held, key=lambda site: site.statistics.range.amax)
        values = top.statistics.range
        table.add_row(
            kind,
            str(len(held)),
            _number(values.amax),
            _number(values.of(1).amax),
            _number(values.of(0).amax),
            "" if math.isnan(values.rms) else f"{values.rms:.3g}",
            escape(top.name),
        )
    console.print(table)


def _place(site: Site, tokenizer: Any | None) -> str:
    peaks = site.statistics.peaks
    if peaks is None or not len(peaks):
        return ""
    token = int(peaks.token_id[0])
    text = f", token {token}" if token >= 0 else ""
    if tokenizer is not None and token >= 0:
        text += f" {escape(repr(tokenizer.decode([token])))}"
    where = f"document {peaks.document[0]}, position {peaks.position[0]}, channel {peaks.channel[0]}"
    return f": {float(peaks.value[0]):+,.6g} in {where}{text}"


def terminal() -> Console:
    """The console that all tables go to: as wide as the terminal, or fixed in a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _decibel(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"
