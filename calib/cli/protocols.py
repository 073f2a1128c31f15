# SPDX-License-Identifier: Apache-2.0
"""`--protocol`: what a published protocol asks of the other options, and what it writes and shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.options import measured, opened
from calib.errors import GateError, Interrupted, UsageError
from calib.output import output_folder, require_free

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement

__all__ = ["follow_protocol", "quantize_by_protocol", "show_protocol"]

_PARTS = 3
"""The published check takes thresholds from 128 rows and quantizes 256 others."""


def follow_protocol(given: dict[str, Any]) -> None:
    """Checks the options against `--protocol` and sets the dtype that it asks for."""
    if given["protocol"] is not None:
        from calib.protocols.max_activations import protocol_dtype

        names = ("protocol", "add_bos", "chat_template", "statistics", "dtype")
        given["dtype"] = protocol_dtype(**{name: given[name] for name in names})


def show_protocol(measurement: Measurement, folder: Path, given: dict[str, Any]) -> None:
    """Writes the authors' files beside a whole measurement, and shows it among the published checkpoints."""
    from calib.protocols.activation_stats import write_activation_stats
    from calib.protocols.max_activations import compare_maxima
    from calib.report.protocols import print_maxima

    comparison = compare_maxima(measurement)
    paths = write_activation_stats(measurement, folder)
    if given["as_json"] or not given["quiet"]:
        print_maxima(comparison, as_json=given["as_json"])
    for path in () if given["as_json"] or given["quiet"] else paths:
        click.echo(f"wrote {path}")


def quantize_by_protocol(source: str, output: Path, given: dict[str, Any], *, is_model: bool) -> None:
    """`calib quantize --protocol int8-sanity`: of a model a third of the batches gives the thresholds."""
    from calib.measurement.artifact import Measurement
    from calib.protocols.int8_sanity import int8_sanity, write_sanity
    from calib.protocols.published import published_sanity
    from calib.report.protocols import print_sanity

    require_free(output, overwrite=given["overwrite"], reads=[source])
    if given["bits"] != 8:
        raise UsageError(f"--bits {given['bits']}: --protocol {given['protocol']} is about 8 bits; leave --bits out")
    calibration: Measurement | None = None
    if is_model:
        calibration, measurement = _halves(source, given)
    else:
        measurement = Measurement.load(Path(source))
        _require_gates(source, measurement)
    sanity = int8_sanity(measurement, given["site_patterns"], calibration=calibration)
    with output_folder(output, overwrite=given["overwrite"]) as work:
        name = write_sanity(measurement, sanity, work).name
    if given["as_json"] or not given["quiet"]:
        print_sanity(sanity, published_sanity(), as_json=given["as_json"])
    if not (given["as_json"] or given["quiet"]):
        click.echo(f"wrote {output / name}")


def _halves(source: str, given: dict[str, Any]) -> tuple[Measurement, Measurement]:
    """A measurement of every third batch, and one of the others."""
    if given["shard"] != "0/1":
        raise UsageError(f"--shard {given['shard']}: --protocol {given['protocol']} divides the batches itself")
    follow_protocol(given)
    found = opened(source, given)
    parts: list[Measurement] = []
    for index in range(_PARTS):
        part, stopped = measured(found, {**given, "site_patterns": (), "shard": f"{index}/{_PARTS}"})
        if stopped:
            raise Interrupted(f"{source}: interrupted while measuring; nothing was written, run the command again")
        if part.run.planned_batches < _PARTS:
            raise GateError(
                f"{source}: {part.run.planned_batches} batches cannot be divided in one third for the thresholds and "
                "two for the errors; pass more --samples or a smaller --batch-size"
            )
        _require_gates(source, part, but="plan_complete")
        parts.append(part)
    return parts[0], parts[1].merge(parts[2])


def _require_gates(source: str, measurement: Measurement, but: str = "") -> None:
    failed = [gate for gate in measurement.gates if not gate.passed and gate.name != but]
    if failed:
        raise GateError(f"{source}: gate {failed[0].name} failed: {failed[0].detail}")
