# SPDX-License-Identifier: Apache-2.0
"""`calib formats`."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("formats")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def command(as_json: bool) -> None:
    """List the formats that scales can be exported in, what each carries and who reads it."""
    from calib.report.export import print_formats

    print_formats(as_json=as_json)
