# SPDX-License-Identifier: Apache-2.0
"""`calib measure MODEL -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calib.cli.options import corpus_options, measured, model_options, opened, output_options, run_options
from calib.errors import GateError, Interrupted
from calib.output import require_free

__all__ = ["command"]


@click.command("measure")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@model_options
@corpus_options
@run_options
@output_options
def command(model: str, output: Path, **given: Any) -> None:
    """Run MODEL over text once and keep what its tensors held.

    MODEL is a hub id, a folder or a .gguf file. Writes measurement.json and measurement.safetensors.
    Exit code 3: done, but a gate failed. 130: interrupted; what was measured is kept.
    """
    require_free(output, overwrite=given["overwrite"])
    found = opened(model, given)
    measurement, stopped = measured(found, given)
    measurement.save(output, overwrite=given["overwrite"])
    from calib.report.terminal import print_json, print_measurement

    if given["as_json"]:
        print_json(output / "measurement.json")
    elif not given["quiet"]:
        print_measurement(measurement, found.tokenizer)
        click.echo(f"wrote {output}")
    if stopped:
        raise Interrupted(f"{output}: interrupted; the batches measured so far are kept, the others are missing")
    failed = [gate for gate in measurement.gates if not gate.passed and not _is_shard(given, gate.name)]
    if failed:
        raise GateError(f"{output}: gate {failed[0].name} failed: {failed[0].detail}")


def _is_shard(given: dict[str, Any], gate: str) -> bool:
    """A shard is incomplete on purpose."""
    return gate == "plan_complete" and given["shard"] != "0/1"
