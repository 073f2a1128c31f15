# SPDX-License-Identifier: Apache-2.0
"""`calib export SCALES --to FORMAT -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calib.cli.config import RecipeCommand
from calib.cli.options import model_options, opened, output_options
from calib.errors import UsageError
from calib.output import require_free

__all__ = ["command"]


@click.command("export", cls=RecipeCommand)
@click.argument("scales", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--to", required=True, help="NAME or NAME:VARIANT; `calib formats` lists them.")
@click.option(
    "--model", help="The model that was measured, before its cures; formats with weights or graph names need it."
)
@click.option("--measurement", type=click.Path(path_type=Path), help="That the scales were chosen from.")
@click.option("--kv-cache", is_flag=True, help="Write scales of keys and values too.")
@click.option("--kv-heads", is_flag=True, help="The same with one scale per head, where the format takes that.")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest file of a checkpoint.")
@model_options
@output_options
def command(scales: Path, output: Path, to: str, **given: Any) -> None:
    """Write SCALES, a scales.json or its folder, in a format that a deployment reads.

    \b
    calib export int8 --to compressed-tensors --model MODEL -o checkpoint
    calib verify checkpoint
    """  # noqa: D301 - click reads the backspace as a mark
    from calib.export.formats import parse_format
    from calib.scales.file import load_scales

    reads = [scales, *([given["measurement"]] if given["measurement"] else [])]
    require_free(output, overwrite=given["overwrite"], reads=reads)
    from calib.export import export_scales

    found, _ = parse_format(to)
    scale_file = load_scales(scales)
    if found.model and not given["model"]:
        raise UsageError(f"format {found.name}: holds weights or names of a graph; pass the model with --model")
    if found.measurement and not given["measurement"]:
        raise UsageError(f"format {found.name}: holds statistics of channels; pass --measurement")
    measurement = None
    if given["measurement"]:
        from calib.measurement.artifact import Measurement

        measurement = Measurement.load(given["measurement"])
    summary = export_scales(
        scale_file,
        output,
        opened(given["model"], given) if given["model"] else None,
        to=to,
        measurement=measurement,
        kv_cache=given["kv_cache"],
        kv_heads=given["kv_heads"],
        shard_size=given["shard_size"],
        source=scales if scales.is_dir() else scales.parent,
        overwrite=given["overwrite"],
    )
    from calib.report.export import print_export

    if not given["quiet"]:
        print_export(summary, output, as_json=given["as_json"])
