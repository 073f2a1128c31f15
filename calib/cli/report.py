# SPDX-License-Identifier: Apache-2.0
"""`calib report DIR`."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.option("-v", "--verbose", count=True, help="Twice shows tracebacks.")
def command(folder: Path, as_json: bool, verbose: int) -> None:
    """Print what a measurement in FOLDER holds."""
    from calib.measurement.artifact import Measurement
    from calib.report.terminal import print_json, print_measurement

    measurement = Measurement.load(folder)
    if as_json:
        print_json(folder / "measurement.json")
    else:
        print_measurement(measurement, None)
