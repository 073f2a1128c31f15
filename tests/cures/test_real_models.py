# SPDX-License-Identifier: Apache-2.0
"""Smoothing of a real model: all of it found, its function kept, its ranges as predicted."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from calib import build_blocks, measure, open_model
from calib.cures import SmoothingSweep, find_pairs
from calib.measurement import MeasureOptions

pytestmark = pytest.mark.slow


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    return math.exp(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())))


def test_smollm2_keeps_its_perplexity_and_its_ranges_follow(smollm2: Path) -> None:
    opened = open_model(str(smollm2))
    blocks = build_blocks(None, opened.tokenizer, samples=8, max_length=128)
    tokens = torch.from_numpy(blocks.input_ids)
    before = perplexity(opened.model, tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle threads spin, which counts as CPU time
    start = time.process_time()
    pairs = find_pairs(opened.model)
    assert time.process_time() - start < 20
    torch.set_num_threads(threads)
    assert len(pairs) == 4 * 30
    assert list(pairs.skipped) == ["lm_head"]
    options = MeasureOptions(batch_size=4)
    measurement = measure(opened, blocks, options)
    sweep = SmoothingSweep(pairs, measurement)
    start = time.process_time()
    predicted = sweep.amax([i / 100 for i in range(100)])
    assert time.process_time() - start < 5
    original = {n: p.detach().clone() for n, p in opened.model.named_parameters()}
    with sweep.smoothing(0.8).apply(opened.model):
        assert perplexity(opened.model, tokens) == pytest.approx(before, rel=1e-4)
        after = measure(opened, blocks, options)
    for site in after.sites.values():
        for name in (site.name, *site.aliases):
            module = name.removesuffix(":input")
            if module in predicted:
                assert site.statistics.range.amax == pytest.approx(float(predicted[module][80]), rel=1e-3)
    assert all(torch.equal(original[n], p) for n, p in opened.model.named_parameters())
