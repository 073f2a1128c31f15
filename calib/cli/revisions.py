# SPDX-License-Identifier: Apache-2.0
"""`calib measure MODEL --revisions a,b,c`: the same token blocks through several checkpoints of one model."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import click

from calib.cli.options import measured, opened
from calib.errors import ArtifactError, GateError, Interrupted, UsageError

__all__ = ["measure_revisions"]


def measure_revisions(model: str, output: Path, given: dict[str, Any]) -> None:
    """Measures each revision into a folder of its own and shows how the peak moves; one model in memory at a time.

    Args:
        model: hub id, whose branches, tags or commits are meant, or a folder that holds one folder per revision.
        output: folder that gets one measurement per revision.
        given: options of the command.

    Raises:
        UsageError: a revision is named twice or options contradict each other.
        ArtifactError: a tokenizer makes other blocks of the text than that of the first revision.
        GateError: all were measured, and a gate of one of them failed.
    """
    names = [name.strip() for name in given["revisions"].split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"--revisions {given['revisions']}: pass two or more different names, with commas")
    for option in ("revision", "resume", "protocol"):
        if given[option]:
            raise UsageError(f"--revisions --{option}: cannot be combined; leave one of them out")
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    corpus = ""
    for name in names:
        inside = (Path(model) / name).is_dir()
        found = opened(str(Path(model) / name) if inside else model, {**given, "revision": None if inside else name})
        measurement, stopped = measured(found, given)
        if corpus not in ("", measurement.corpus.content_sha256):
            raise ArtifactError(f"{name}: its tokenizer makes other token blocks than {names[0]}; measure it apart")
        corpus = measurement.corpus.content_sha256
        folder = output / name.replace("/", "--")
        measurement.save(folder, overwrite=given["overwrite"])
        if stopped:
            raise Interrupted(f"{folder}: interrupted; the revisions measured before are complete")
        top = max(measurement.sites.values(), key=lambda site: site.statistics.range.amax)
        rows.append({"revision": name, "peak": top.statistics.range.amax, "site": top.name})
        failed += [f"{folder}: gate {g.name} failed: {g.detail}" for g in measurement.gates if not g.passed]
        del found, measurement, top
        gc.collect()
    _show(rows, output, given)
    if failed:
        raise GateError(failed[0])


def _show(rows: list[dict[str, Any]], output: Path, given: dict[str, Any]) -> None:
    """The peak of each revision, as a table and a line."""
    from calib.report.terminal import sparkline

    if given["as_json"]:
        click.echo(json.dumps({"revisions": rows}))
    elif not given["quiet"]:
        width = max(len(row["revision"]) for row in rows)
        for row in rows:
            click.echo(f"{row['revision']:<{width}}  peak {row['peak']:>12,.6g}  at {row['site']}")
        click.echo(f"peak by revision  {sparkline([row['peak'] for row in rows])}")
        click.echo(f"wrote {output}")
