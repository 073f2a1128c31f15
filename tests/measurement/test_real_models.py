# SPDX-License-Identifier: Apache-2.0
"""Whole runs on real models, against hooks that know nothing of calib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calib.corpus import TokenBlocks, build_blocks
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model

pytestmark = pytest.mark.slow


def naive_extremes(opened: OpenedModel, blocks: TokenBlocks, batch_size: int) -> dict[str, tuple[float, float]]:
    """Smallest and largest value at the input and output of every leaf module and attention block."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, value: Any) -> None:
        value = (value or (None,))[0] if isinstance(value, tuple) else value
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            low, high = found.get(name, (float("inf"), float("-inf")))
            found[name] = (min(low, value.min().item()), max(high, value.max().item()))

    handles = []
    for name, module in opened.model.named_modules():

        def before(m: nn.Module, args: Any, name: str = name) -> None:
            note(f"{name}:input", args)

        def after(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
            note(f"{name}:output", output)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with torch.no_grad():
        for rows in blocks.batches(batch_size):
            opened.model(input_ids=torch.from_numpy(blocks.input_ids[rows]))
    for handle in handles:
        handle.remove()
    return found


def check_against_naive(measurement: Measurement, naive: dict[str, tuple[float, float]]) -> int:
    checked = 0
    for name, site in measurement.sites.items():
        values = site.statistics.range
        for known in [name, *site.aliases]:
            if known in naive:
                assert (values.min, values.max) == naive[known], known
                assert values.amax == max(abs(values.min), abs(values.max))
                checked += 1
    return checked


def test_smollm2_extremes_and_its_peak(smollm2: Path) -> None:
    opened = open_model(smollm2, device="cpu")
    blocks = build_blocks(["builtin:prose"], opened.tokenizer, samples=4, max_length=256)
    measurement = measure(opened, blocks, MeasureOptions(batch_size=2, weights=False))
    assert measurement.passed
    assert check_against_naive(measurement, naive_extremes(opened, blocks, 2)) > 600
    inputs = {n: s for n, s in measurement.sites.items() if "linear_input" in s.kinds}
    top = max(inputs.values(), key=lambda s: s.statistics.range.amax)
    assert top.name == "model.layers.11.mlp.down_proj:input"
    assert 2_500 < top.statistics.range.amax < 4_000
    peaks = top.statistics.peaks
    assert peaks is not None
    assert peaks.position[0] == 0
    row = int((blocks.document == peaks.document[0]).argmax())
    assert peaks.token_id[0] in blocks.input_ids[blocks.document == peaks.document[0], 0], row


def test_minilm_extremes(minilm: Path) -> None:
    opened = open_model(minilm, device="cpu")
    blocks = build_blocks(["builtin:code"], opened.tokenizer, samples=4, max_length=128)
    measurement = measure(opened, blocks, MeasureOptions(batch_size=2, weights=False))
    assert measurement.passed
    assert check_against_naive(measurement, naive_extremes(opened, blocks, 2)) > 100
