# SPDX-License-Identifier: Apache-2.0
"""`calib methods`."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("methods")
def command() -> None:
    """List the methods that choose scales."""
    from calib.scales import METHODS

    for name, method in METHODS.items():
        click.echo(f"{name:12} {method.summary}")
