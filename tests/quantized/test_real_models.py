# SPDX-License-Identifier: Apache-2.0
"""A real model: what is known to cost little costs little, and what is known to cost more costs more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.corpus import build_blocks
from calib.models import open_model
from calib.quantized import IntegerGrid, QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.hessian import collect_hessians, compensated

pytestmark = pytest.mark.slow


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_of_smollm2_rises_in_the_order_of_what_is_rounded(smollm2: Path) -> None:
    opened = open_model(smollm2, device="cpu", dtype="float32")
    model = opened.model
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=16, max_length=256)
    ids, data = torch.from_numpy(blocks.input_ids[:4]), torch.from_numpy(blocks.input_ids[4:])
    plain = perplexity(model, ids)

    def quantized(mode: Any = "fake", **options: Any) -> float:
        plan = plan_from_scales(model, **options)
        with QuantizedModel(model, plan, mode=mode) as context:
            found = perplexity(model, ids)
        assert context.silent() == []
        assert context.not_int8 == {}
        return found

    weights = quantized(inputs="none")
    both = quantized(inputs="dynamic-per-token")
    in_int8 = quantized("int8", inputs="dynamic-per-token")
    four_bits = WeightScheme(IntegerGrid.of(4))
    nearest = quantized(inputs="none", weights=four_bits)
    assert weights < 1.02 * plain
    assert weights < both < 1.1 * plain
    assert in_int8 == pytest.approx(both, rel=0.02)
    assert nearest > 1.5 * plain

    # 3072 tokens for up to 1536 inputs: with fewer tokens than inputs, error compensation fits noise and makes it worse
    plan = plan_from_scales(model, inputs="none", weights=four_bits)
    with torch.no_grad(), collect_hessians(model, plan.weights) as hessians:
        model(input_ids=data)
    with QuantizedModel(model, compensated(plan, model, hessians)):
        assert perplexity(model, ids) < nearest
    assert perplexity(model, ids) == plain
