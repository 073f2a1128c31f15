# SPDX-License-Identifier: Apache-2.0
"""`calib sites MODEL`: a dry run."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import click

from calib.cli.options import model_options, opened, output_options

__all__ = ["command"]

_TOKENS = 64


@click.command("sites")
@click.argument("model")
@click.option("--samples", default=128, show_default=True, help="Blocks to predict the time for.")
@click.option("--max-length", default=512, show_default=True, help="Tokens of a block.")
@model_options
@output_options
def command(model: str, samples: int, max_length: int, **given: Any) -> None:
    """Show what `calib measure MODEL` would measure, with predicted time and memory.

    Runs 64 tokens through the model to learn which names are the same tensor.
    """
    import torch

    from calib.measurement.calibration import Calibration
    from calib.measurement.failure import explained
    from calib.measurement.head import can_skip_head, takes_cache, without_head
    from calib.report.terminal import print_sites

    found = opened(model, given)
    from calib.models.device import input_device

    device = input_device(found.model)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, **({"use_cache": False} if takes_cache(found.model) else {})}
    skipping = without_head(found.model) if can_skip_head(found.model, device) else nullcontext()
    with torch.no_grad(), skipping, explained(found, tuple(ids.shape)):
        found.model(**inputs)
        begin = time.perf_counter()
        found.model(**inputs)
        seconds = (time.perf_counter() - begin) / _TOKENS * samples * max_length
        with Calibration(found.model) as calibration:
            found.model(**inputs)
    print_sites(calibration.sites(), calibration.silent_ports(), seconds, as_json=given["as_json"])
