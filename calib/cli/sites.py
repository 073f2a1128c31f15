# SPDX-License-Identifier: Apache-2.0
"""`calib sites MODEL`: a dry run."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from calib.cli.examples import require_processor
from calib.cli.options import model_options, opened, output_options

if TYPE_CHECKING:
    from calib.models import OpenedModel

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

    Runs 64 tokens, or a grey picture, or a second of silence, through the model to learn which names are the same
    tensor. Towers of a model that writes text are not run, and are listed as not reached.
    """
    import torch

    from calib.measurement.calibration import Calibration
    from calib.measurement.failure import explained
    from calib.measurement.head import can_skip_head, without_head
    from calib.models.device import input_device
    from calib.report.terminal import print_sites

    found = opened(model, given)
    device = input_device(found.model)
    inputs, units = _trial(found, samples, max_length)
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    skipping = without_head(found.model) if can_skip_head(found.model, device) else nullcontext()
    with torch.no_grad(), skipping, explained(found, tuple(next(iter(inputs.values())).shape)):
        found.model(**inputs)
        begin = time.perf_counter()
        found.model(**inputs)
        seconds = (time.perf_counter() - begin) * units
        with Calibration(found.model) as calibration:
            found.model(**inputs)
    print_sites(calibration.sites(), calibration.silent_ports(), seconds, as_json=given["as_json"])


def _trial(found: OpenedModel, samples: int, max_length: int) -> tuple[dict[str, Any], float]:
    """Arguments of a small forward pass, and how many such passes the whole measurement is."""
    import torch

    from calib.measurement.head import takes_cache
    from calib.models.takes import generates, takes, writes

    model = found.model
    kinds = takes(model)
    inputs: dict[str, Any] = {}
    if "text" in kinds or not kinds:
        inputs["input_ids"] = torch.zeros(1, _TOKENS, dtype=torch.long)
        inputs |= {"use_cache": False} if takes_cache(model) else {}
    if not inputs or (len(kinds) > 1 and not generates(model)):  # CLIP compares texts with pictures, and needs both
        inputs |= _media(found, kinds - {"text"})
    if writes(model):
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    return inputs, samples * max_length / _TOKENS if "input_ids" in inputs else float(samples)


def _media(found: OpenedModel, kinds: frozenset[str]) -> dict[str, Any]:
    """A grey picture, or a second of silence."""
    import numpy as np

    from calib.models.takes import parameters_of

    processor = require_processor(found, kinds)
    if "image" in kinds:
        grey = np.full((64, 64, 3), 128, np.uint8)
        made = getattr(processor, "image_processor", processor)(images=[grey], return_tensors="pt")
    else:
        extractor = getattr(processor, "feature_extractor", processor)
        rate = extractor.sampling_rate
        made = extractor(np.zeros(rate, np.float32), sampling_rate=rate, return_tensors="pt")
    names = parameters_of(found.model)
    return {name: v for name, v in made.items() if names is None or name in names}
