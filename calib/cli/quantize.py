# SPDX-License-Identifier: Apache-2.0
"""`calib quantize DIR|MODEL --bits 8 -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.config import RecipeCommand
from calib.cli.cure import cure_options, quantize_cured
from calib.cli.options import corpus_options, measured, model_options, opened, output_options, run_options
from calib.cli.protocols import quantize_by_protocol
from calib.errors import GateError, Interrupted, UsageError
from calib.output import output_folder, require_free

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.models import OpenedModel
    from calib.schema.scales import ScaleFile

__all__ = ["command"]

RECORD = "measurement.json"


@click.command("quantize", cls=RecipeCommand)
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--bits", default=8, show_default=True, help="2 to 16.")
@click.option("--method", default="absmax,percentile,mse,entropy", show_default=True,
              help="Comma-separated; the first one chooses, all are compared.")  # fmt: skip
@click.option("--symmetric/--asymmetric", default=True, show_default=True, help="Grid of activations.")
@click.option(
    "--granularity", type=click.Choice(["per-tensor", "per-channel"]), default="per-tensor", show_default=True
)
@click.option(
    "--weight-granularity", type=click.Choice(["per-row", "per-tensor"]), default="per-row", show_default=True
)
@cure_options
@click.option("--protocol", type=click.Choice(["int8-sanity"]), help="Run a published check instead; see docs.")
@model_options
@corpus_options
@run_options
@output_options
def command(source: str, output: Path, **given: Any) -> None:
    """Choose scales from SOURCE and say what error to expect.

    SOURCE is a folder that `calib measure` wrote, which needs no model, or a model, which is measured first. Writes
    scales.json, and for a model also a static W8A8 checkpoint that transformers loads (8 bits, per tensor).
    Exit code 3: a gate of the measurement failed, and nothing was written.
    """
    from calib.measurement.artifact import Measurement
    from calib.scales import Grid, choose_scales, compare_methods, parse_method, save_scales

    if given["protocol"] is not None:
        quantize_by_protocol(source, output, given, is_model=not _is_measurement(Path(source)))
        return
    require_free(output, overwrite=given["overwrite"], reads=[source])
    if given["cure"] != "none" or given["keep"]:
        if _is_measurement(Path(source)):
            raise UsageError(f"{source}: --cure changes and runs the model; pass the MODEL instead of a measurement")
        quantize_cured(source, output, given)
        return
    Grid(given["bits"], given["symmetric"])
    methods = [name.strip() for name in given["method"].split(",")]
    for name in methods:
        parse_method(name)
    found = None if _is_measurement(Path(source)) else opened(source, given)
    measurement = Measurement.load(Path(source)) if found is None else _measured(found, source, given)
    failed = [gate for gate in measurement.gates if not gate.passed]
    if failed:
        raise GateError(f"{source}: gate {failed[0].name} failed: {failed[0].detail}")
    scales = choose_scales(
        measurement,
        bits=given["bits"],
        method=methods[0],
        symmetric=given["symmetric"],
        granularity=given["granularity"],
        weight_granularity=given["weight_granularity"],
        sites=given["site_patterns"],
        ignore=given["ignore"],
    )
    rows = compare_methods(measurement, methods, given["bits"], given["symmetric"]) if measurement.full else []
    with output_folder(output, overwrite=given["overwrite"]) as work:
        save_scales(scales, work)
        checkpoint = None if found is None else _checkpoint(found, scales, work)
    from calib.report.terminal import print_json, print_scales

    if given["as_json"]:
        print_json(output / "scales.json")
    elif not given["quiet"]:
        print_scales(scales, rows)
        click.echo(f"wrote {output / 'scales.json'}")
        if checkpoint is not None:
            click.echo(checkpoint)


def _checkpoint(found: OpenedModel, scales: ScaleFile, folder: Path) -> str:
    """Writes a checkpoint if one can hold the scales; returns what to say of it."""
    from calib.export import write_checkpoint  # imports torch, which scales alone do not need
    from calib.export.compressed_tensors import why_no_checkpoint

    why = why_no_checkpoint(scales, found.model)
    if why is not None:
        return f"no checkpoint: {why}"
    summary = write_checkpoint(found, scales, folder)
    layers = f"{len(summary.quantized)} layers in INT8, {len(summary.in_float)} in float"
    return f"wrote a compressed-tensors checkpoint: {layers}"


def _is_measurement(folder: Path) -> bool:
    """Whether a folder is a measurement, or at least no model."""
    if (folder / RECORD).is_file():
        return True
    return folder.is_dir() and not (folder / "config.json").is_file() and not any(folder.glob("*.gguf"))


def _measured(found: OpenedModel, source: str, given: dict[str, Any]) -> Measurement:
    measurement, stopped = measured(found, given)
    if stopped:
        raise Interrupted(f"{source}: interrupted while measuring; nothing was written, use `calib measure` to keep it")
    return measurement
