# SPDX-License-Identifier: Apache-2.0
"""`calib merge DIR... -o DIR`."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import click

from calib.cli.protocols import show_protocol
from calib.errors import GateError

__all__ = ["command"]


@click.command("merge")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@click.option("-v", "--verbose", count=True, help="Twice shows tracebacks.")
def command(folders: tuple[Path, ...], output: Path, overwrite: bool, verbose: int) -> None:
    """Join the shards of one measurement in FOLDERS; the result equals a measurement in one run."""
    from calib.measurement.artifact import Measurement

    whole = reduce(Measurement.merge, [Measurement.load(folder) for folder in folders])
    whole.save(output, overwrite=overwrite)
    click.echo(f"wrote {output}")
    if whole.run.protocol == "max-activations" and len(whole.run.batches) == whole.run.planned_batches:
        show_protocol(whole, output, {"as_json": False, "quiet": False})
    failed = [gate for gate in whole.gates if not gate.passed]
    if failed:
        raise GateError(f"{output}: gate {failed[0].name} failed: {failed[0].detail}")
