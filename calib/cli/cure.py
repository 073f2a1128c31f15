# SPDX-License-Identifier: Apache-2.0
"""`calib quantize MODEL --cure ...`: which cures, how they are searched, and what is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.examples import require_text
from calib.cli.options import batch_size, build_corpus, measured_blocks, opened
from calib.errors import GateError, Interrupted, UsageError
from calib.output import output_folder

if TYPE_CHECKING:
    from calib.corpus import TokenBlocks
    from calib.cures.result import Cured, CureOptions
    from calib.measurement.artifact import Measurement
    from calib.models import OpenedModel

__all__ = ["cure_options", "quantize_cured"]

HELD_OUT = 16
"""Blocks that ranges never see: half of them decide, the others make the table."""


def cure_options(function: Any) -> Any:
    """Adds the options to a command."""
    for option in (
        click.option("--keep", default=0, show_default=True, help="With --cure: most layers left in float."),
        click.option(
            "--target",
            "--budget",
            "target",
            default=1.01,
            show_default=True,
            help="With --cure: the search stops when perplexity over that of the float model is surely below.",
        ),
        click.option(
            "--cure",
            default="none",
            show_default=True,
            help="none; auto (smooth,prefix,rotate,compensate, of language models rotate-online); or a list of these, "
            "resample, scale and keep.",
        ),
    ):
        function = option(function)
    return function


def quantize_cured(source: str, output: Path, given: dict[str, Any]) -> None:
    """Measures a model, searches for cures, and writes the cured checkpoint, its scales and the ablation."""
    from calib.cures.search import find_cure
    from calib.cures.trials import search_rows

    begin = time.perf_counter()
    options = _options(given)
    found = opened(source, given)
    require_text(found, given, "--cure")
    blocks, held_out = _split(build_corpus(found, {**given, "samples": given["samples"] + HELD_OUT}))
    measurement = _measured(found, search_rows(blocks), source, given)
    if not measurement.passed:  # few blocks may not reach every expert
        measurement = _measured(found, blocks, source, given)
    failed = [gate for gate in measurement.gates if not gate.passed]
    if failed:
        raise GateError(f"{source}: gate {failed[0].name} failed: {failed[0].detail}")

    def say(line: str) -> None:
        if not given["quiet"] and not given["as_json"]:
            click.echo(line, err=True)

    cured = find_cure(found, measurement, blocks, held_out, options, say=say)
    _print(cured, output, _write(cured, output, given), given)
    if not given["as_json"] and not given["quiet"]:
        spent, measuring = time.perf_counter() - begin, cured.measurement.run.seconds or 0.0
        click.echo(f"{spent:.0f} s in all, {measuring:.0f} s of them measuring what was chosen on {len(blocks)} blocks")


def _measured(found: OpenedModel, blocks: TokenBlocks, source: str, given: dict[str, Any]) -> Measurement:
    measurement, stopped = measured_blocks(found, blocks, given)
    if stopped:
        raise Interrupted(f"{source}: interrupted while measuring; nothing was written")
    return measurement


def _split(corpus: TokenBlocks) -> tuple[TokenBlocks, TokenBlocks]:
    """Blocks for ranges, and blocks held out."""
    held = min(HELD_OUT, max(2, len(corpus) // 4))
    if len(corpus) <= held:
        raise UsageError(f"--cure: {len(corpus)} blocks of text, {held} must be held out; give more, or shorter ones")
    cut = len(corpus) - held
    return corpus.select(range(cut)), corpus.select(range(cut, len(corpus)))


def _write(cured: Cured, output: Path, given: dict[str, Any]) -> int | str:
    """Everything at once; returns how many layers the checkpoint has in INT8, or why there is none.

    There is none where a consumer would have to compute something that no checkpoint says: it would load, and be wrong.
    Weights that were rounded with error compensation are in a file of their own too, for other formats.
    """
    from calib.export import write_checkpoint
    from calib.export.compressed_tensors import why_no_checkpoint
    from calib.quantized.rounded_file import ROUNDED_FILE, save_rounded
    from calib.scales import save_scales

    with output_folder(output, overwrite=given["overwrite"]) as work:
        save_scales(cured.scales, work)
        _save_cures(cured, work)
        rounded = cured.plan.rounded
        if rounded:
            save_rounded(rounded, work / ROUNDED_FILE)
        why = why_no_checkpoint(cured.scales, cured.opened.model)
        if why is not None:
            return why
        return len(write_checkpoint(cured.opened, cured.scales, work, rounded).quantized)


def _print(cured: Cured, output: Path, checkpoint: int | str, given: dict[str, Any]) -> None:
    from calib.report.cures import print_cures
    from calib.report.terminal import print_json

    if given["as_json"]:
        print_json(output / "cures.json")
    elif not given["quiet"]:
        print_cures(cured)
        click.echo(f"wrote {output / 'scales.json'}")
        if isinstance(checkpoint, str):
            click.echo(f"no checkpoint: {checkpoint}")
        else:
            click.echo(f"wrote a compressed-tensors checkpoint: {checkpoint} layers in INT8")


def _options(given: dict[str, Any]) -> CureOptions:
    from calib.cures.result import CureOptions

    names = [name.strip() for name in given["cure"].split(",") if name.strip()]
    if "none" in names and len(names) > 1:
        raise UsageError(f"--cure {given['cure']}: none goes alone")
    for name, needed in (
        ("method", "absmax"),
        ("granularity", "per-tensor"),
        ("statistics", "full"),
        ("shard", "0/1"),
    ):
        if not str(given[name]).startswith(needed):
            raise UsageError(
                f"--{name.replace('_', '-')} {given[name]}: cures are searched with {needed}; leave the option out"
            )
    if given["layout"] != "blocks":
        raise UsageError("--layout documents: cures compare models on blocks of equal length; leave the option out")
    if given["site_patterns"] or given["ignore"]:
        raise UsageError("--sites/--ignore: cures are searched over all linear layers; leave the patterns out")
    wanted = [*names, "keep"] if given["keep"] and "keep" not in names else names
    return CureOptions(
        cures=tuple(dict.fromkeys(wanted)),
        target=given["target"],
        bits=given["bits"],
        symmetric=given["symmetric"],
        weight_granularity=given["weight_granularity"],
        keep=given["keep"] or (3 if "keep" in wanted else 0),
        batch_size=batch_size(given["batch_size"]) or 4,
    )


def _save_cures(cured: Cured, folder: Path) -> None:
    """The ablation as `cures.json`; the scales of a smoothing as `smoothing.safetensors`."""
    import json
    from dataclasses import asdict

    from calib.cures import save_smoothing

    record = {
        "chosen": cured.candidate.name,
        "reason": cured.reason,
        "rows": [
            {
                "name": row.name,
                "divergence": asdict(row.divergence),
                "ratio": None if row.ratio is None else asdict(row.ratio),
                "seconds": row.seconds,
            }
            for row in cured.rows
        ],
        "skipped": cured.skipped,
        "measuring_seconds": cured.measurement.run.seconds,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "cures.json").write_text(text + "\n", encoding="utf-8")
    if cured.candidate.smoothing is not None:
        save_smoothing(cured.candidate.smoothing, folder / "smoothing.safetensors")
