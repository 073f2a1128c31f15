# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are loaded by transformers and must give, bit for bit, what our own arithmetic gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from calib.corpus import build_blocks
from calib.errors import ArtifactError, ModelError, UsageError
from calib.export.compressed_tensors import write_checkpoint
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel, plan_from_scales
from calib.scales import choose_scales


def emulated(opened: OpenedModel, scales: Any, in_float: dict[str, str], ids: torch.Tensor) -> torch.Tensor:
    """The float model, fake-quantized on the grid of the format."""
    plan = plan_from_scales(opened.model, scales, convention="compressed-tensors")
    linear = {n for n, m in opened.model.named_modules() if isinstance(m, nn.Linear)}
    assert set(plan.left_out) & linear == set(in_float)
    with torch.no_grad(), QuantizedModel(opened.model, plan) as quantized:
        result = first_output(opened.model(input_ids=ids))
    assert quantized.silent() == []
    return result


def first_output(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def check(folder: Path, out: Path, *, symmetric: bool) -> None:
    opened = open_model(folder, device="cpu", dtype="float32")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=4, max_length=32)
    scales = choose_scales(measure(opened, blocks, MeasureOptions()), symmetric=symmetric)
    summary = write_checkpoint(opened, scales, out)
    ids = torch.from_numpy(blocks.input_ids[:2])
    loaded = type(opened.model).from_pretrained(out).eval()
    with torch.no_grad():
        found = first_output(loaded(input_ids=ids))
        plain = first_output(opened.model(input_ids=ids))
    ours = emulated(opened, scales, summary.in_float, ids)
    assert torch.equal(found, ours)
    assert not torch.equal(found, plain)
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab() == opened.tokenizer.get_vocab()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_transformers_computes_what_we_compute(
    name: str, symmetric: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    check(request.getfixturevalue(name), tmp_path, symmetric=symmetric)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_real_models_too(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check(request.getfixturevalue(name), tmp_path, symmetric=True)


def test_what_stays_in_float_is_listed_with_its_reason(tiny_llama: Path, tmp_path: Path) -> None:
    opened = open_model(tiny_llama, device="cpu")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=32)
    scales = choose_scales(measure(opened, blocks, MeasureOptions()), ignore=["*.down_proj:input"])
    summary = write_checkpoint(opened, scales, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == sorted(summary.in_float)
    assert {"lm_head", "model.layers.0.mlp.down_proj"} <= set(summary.in_float)
    assert "rope_theta" in config


def test_scales_that_do_not_fit_are_refused(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    opened = open_model(tiny_llama, device="cpu")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=32)
    measurement = measure(opened, blocks, MeasureOptions())
    with pytest.raises(UsageError, match="--bits 4"):
        write_checkpoint(opened, choose_scales(measurement, bits=4), tmp_path)
    other = open_model(tiny_gpt2, device="cpu")
    with pytest.raises(ArtifactError, match="another model"):
        write_checkpoint(other, choose_scales(measurement), tmp_path)
    theirs = measure(other, build_blocks(["builtin:speeches"], other.tokenizer, samples=2, max_length=32))
    with pytest.raises(ModelError, match="no linear layer"):
        write_checkpoint(other, choose_scales(theirs), tmp_path)
    assert list(tmp_path.iterdir()) == []
