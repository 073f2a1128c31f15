# SPDX-License-Identifier: Apache-2.0
"""The command line. Commands import what they need when they run, so that `calib --help` is instant."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

import click

from calib.errors import CalibError

__all__ = ["main"]

COMMANDS = {
    "measure": "Run a model over text once and keep what its tensors held.",
    "quantize": "Choose scales from a measurement, or from a model, and say what error to expect.",
    "sites": "Show what would be measured, without measuring.",
    "report": "Print what a measurement holds.",
    "evaluate": "Say what quantization costs, against the float model.",
    "export": "Write scales in a format that a deployment reads.",
    "verify": "Check an export, and run it in its consumer.",
    "import": "Read the scales of an export, also of another program.",
    "merge": "Join the shards of one measurement.",
    "distill": "Measure and raise what a teacher knows (CMI); train students.",
    "methods": "List the methods that choose scales.",
    "formats": "List the formats that scales can be exported in.",
}


LONGEST = 300
"""Characters of an exception's text that are shown; some print a whole configuration."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is run or its help is read."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command."""
        if cmd_name not in COMMANDS:
            return None
        module = "import_" if cmd_name == "import" else cmd_name  # a word of Python cannot name a module
        command = importlib.import_module(f"calib.cli.{module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="calib")
def cli() -> None:
    """Measure activations once, decide on quantization forever.

    \b
    calib measure MODEL -o measured             128 blocks of 512 tokens of the built-in corpus
    calib quantize measured --bits 8 -o int8    scales.json and the error tables, offline
    """  # noqa: D301 - click reads the backspace as a mark


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns errors into one line and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    verbose = sum(a.count("v") for a in given if a.startswith("-v") and set(a[1:]) == {"v"})
    verbose += given.count("--verbose")
    own_process(verbose=verbose > 0)
    try:
        cli.main(args=given, prog_name="calib", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except CalibError as error:
        if verbose > 1:
            traceback.print_exc()
        click.echo(f"calib: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("calib: interrupted; nothing was written", err=True)
        sys.exit(130)
    except Exception as error:  # the end of the process: what no part of calib foresaw is one line too
        if verbose > 1:
            traceback.print_exc()
        click.echo(f"calib: {_unforeseen(error)}", err=True)
        sys.exit(1)


def _unforeseen(error: Exception) -> str:
    """One line of an exception that is none of calib's: of the operating system, a library, or a defect."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or text}; pass another path"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"stopped by {type(error).__name__}: {text or 'no reason given'}; -v -v shows where, for a report of it"


def own_process(*, verbose: bool = False) -> None:
    """Settings that only the owner of a process may choose, before torch, numba and transformers are imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not verbose:  # it advises on kernels and masks as models run, on the terminal of a user who called neither
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cache = Path(os.environ.get("CALIB_CACHE", Path.home() / ".cache" / "calib"))
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache / "numba"))
