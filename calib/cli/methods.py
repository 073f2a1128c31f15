# SPDX-License-Identifier: Apache-2.0
"""`calib methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from calib.scales import Method

__all__ = ["command"]


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def command(as_json: bool) -> None:
    """List the methods that choose scales."""
    from calib.scales import METHODS

    if as_json:
        click.echo(json.dumps([_row(method) for method in METHODS.values()], indent=2))
        return
    for name, method in METHODS.items():
        click.echo(f"{name:12} {method.summary}")


def _row(method: Method) -> dict[str, Any]:
    parameter = None if method.parameter is None else asdict(method.parameter)
    needs = {"needs_histogram": method.needs_histogram}
    return {"name": method.name, "summary": method.summary, "parameter": parameter, **needs}
