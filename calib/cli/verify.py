# SPDX-License-Identifier: Apache-2.0
"""`calib verify DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calib.cli.options import model_options, opened
from calib.errors import GateError

__all__ = ["command"]


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--consumer", help="Program to run; the first one that reads the format if absent.")
@click.option("--run/--no-run", default=True, show_default=True, help="Run the consumer, if it is installed.")
@click.option("--model", help="The float model, to compare whole-model outputs of a graph with calib's own.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", count=True, help="Twice shows tracebacks.")
def command(folder: Path, consumer: str | None, run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Check an exported FOLDER: names, shapes, dtypes, values; then load and run it in its consumer.

    Exit code 3: something is missing, differs from the scale file, or the consumer computes something else.
    """
    from calib.export import verify_export
    from calib.report.export import print_verification

    model = opened(given["model"], given) if given["model"] else None
    found = verify_export(folder, consumer, model=model, run=run)
    if as_json or not quiet:
        print_verification(found, as_json=as_json)
    if not found.passed:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise GateError(f"{folder}: {found.problems[0]}{more}; do not deploy it, export again")
