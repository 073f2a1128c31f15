# SPDX-License-Identifier: Apache-2.0
"""`calib measure MODEL -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.config import RecipeCommand
from calib.cli.options import corpus_options, measured, model_options, opened, output_options, run_options
from calib.cli.protocols import follow_protocol, show_protocol
from calib.cli.revisions import measure_revisions
from calib.errors import GateError, Interrupted, UsageError
from calib.output import require_free

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement

__all__ = ["command"]


@click.command("measure", cls=RecipeCommand)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@model_options
@corpus_options
@run_options
@click.option("--protocol", type=click.Choice(["max-activations"]), help="Follow a published protocol; see docs.")
@click.option("--revisions", help="a,b,c: revisions of a hub id, or folders inside MODEL, each into its own folder.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted measurement in the output folder.")
@output_options
def command(model: str, output: Path, **given: Any) -> None:
    """Run MODEL over text once and keep what its tensors held.

    MODEL is a hub id, a folder or a .gguf file. Writes measurement.json and measurement.safetensors.
    Exit code 3: done, but a gate failed. 130: interrupted; what was measured is kept, and the same command with
    --resume measures the rest.
    """
    if given["revisions"]:
        measure_revisions(model, output, given)
        return
    held = _interrupted(output, given) if given["resume"] else None
    require_free(output, overwrite=given["overwrite"] or held is not None, reads=[model])
    follow_protocol(given)
    found = opened(model, given)
    measurement, stopped = measured(found, given, held)
    measurement.save(output, overwrite=given["overwrite"] or held is not None)
    from calib.report.terminal import print_json, print_measurement

    by_protocol = given["protocol"] is not None and len(measurement.run.batches) == measurement.run.planned_batches
    if given["as_json"] and not by_protocol:
        print_json(output / "measurement.json")
    elif not (given["as_json"] or given["quiet"]):
        print_measurement(measurement, found.tokenizer)
        click.echo(f"wrote {output}")
    if by_protocol:
        show_protocol(measurement, output, given)
    if stopped:
        raise Interrupted(f"{output}: interrupted; the batches measured so far are kept, --resume measures the others")
    failed = [gate for gate in measurement.gates if not gate.passed and not _is_shard(given, gate.name)]
    if failed:
        raise GateError(f"{output}: gate {failed[0].name} failed: {failed[0].detail}")


def _interrupted(output: Path, given: dict[str, Any]) -> Measurement | None:
    """The measurement to go on with; None if nothing was written yet."""
    from calib.measurement.artifact import Measurement

    if given["overwrite"]:
        raise UsageError("--resume --overwrite: contradict each other; pass one of them")
    if not output.exists():
        return None
    held = Measurement.load(output)
    if next(gate.passed for gate in held.gates if gate.name == "plan_complete"):
        raise UsageError(f"{output}: is complete, nothing is left to resume; pass another -o, or --overwrite")
    return held


def _is_shard(given: dict[str, Any], gate: str) -> bool:
    """A shard is incomplete on purpose."""
    return gate == "plan_complete" and given["shard"] != "0/1"
