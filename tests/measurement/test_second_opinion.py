# SPDX-License-Identifier: Apache-2.0
"""Ranges equal, bit for bit, those of a probe that shares nothing with calib: replaced functions, no hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import tiny_models
from calib.measurement import Calibration, Site
from tests.measurement.functional_probe import Extent, Seen, functional_probe

CASES = {
    "dense": ("LlamaForCausalLM", "llama", "causal"),
    "dense with sliding windows": ("Gemma3ForCausalLM", "gemma3_text", "causal"),
    "fused experts": ("Qwen3MoeForCausalLM", "qwen3_moe", "causal"),
    "fused experts with bias": ("GptOssForCausalLM", "gpt_oss", "causal"),
    "latent attention and shared experts": ("DeepseekV3ForCausalLM", "deepseek_v3", "causal"),
    "hybrid of linear and full attention": ("Qwen3NextForCausalLM", "qwen3_next", "causal"),
    "images and text": ("LlavaForConditionalGeneration", "llava", "image-text"),
    "encoder and decoder": ("BartForConditionalGeneration", "bart", "seq2seq"),
    "relative positions": ("T5ForConditionalGeneration", "t5", "seq2seq"),
    "convolutions": ("ResNetForImageClassification", "resnet", "image"),
}


def extent_of(sites: dict[str, Site], name: str) -> Extent:
    """Over all calls of a module."""
    total = Extent()
    for site in sites.values():
        for other in {site.name, *site.aliases}:
            if other.partition("#")[0] == name:
                span = site.statistics.range
                total.low, total.high = min(total.low, span.min), max(total.high, span.max)
                total.count += span.count_all
    return total


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[Seen, dict[str, Site], Calibration]:
    with torch.no_grad():
        with functional_probe(model) as seen:
            expected = model(**inputs)
        with Calibration(model, keep_cache=False) as calibration:
            found = model(**inputs)
    assert torch.equal(expected.logits, found.logits)
    return seen, calibration.sites(), calibration


@pytest.mark.parametrize("case", CASES)
def test_ranges_are_those_of_the_functions_themselves(case: str) -> None:
    class_name, model_type, task = CASES[case]
    model = tiny_models.build(class_name, model_type)
    inputs = tiny_models.inputs_of(model, task)[0]
    assert task != "image-text" or "pixel_values" in inputs
    seen, sites, _ = run(model, inputs)
    assert seen.reads
    for name, extent in seen.reads.items():
        assert extent_of(sites, f"{name}:input") == extent, name
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    for name, extent in seen.makes.items():
        if name != head:
            assert extent_of(sites, f"{name}:output") == extent, name


@pytest.mark.parametrize("case", ["dense", "hybrid of linear and full attention", "encoder and decoder"])
def test_queries_keys_and_values_are_what_attention_is_given(case: str) -> None:
    class_name, model_type, task = CASES[case]
    model = tiny_models.build(class_name, model_type)
    seen, sites, _ = run(model, tiny_models.inputs_of(model, task)[0])
    for position, part in enumerate(("query", "key", "value")):
        named = [
            s for s in sites.values() if any(n.partition("#")[0].endswith(f":{part}") for n in {s.name, *s.aliases})
        ]
        assert len(named) == len(seen.attention)
        expected = sorted((e[position].low, e[position].high) for e in seen.attention)
        assert sorted((s.statistics.range.min, s.statistics.range.max) for s in named) == expected


@pytest.mark.parametrize(
    ("class_name", "model_type"), [("Qwen3MoeForCausalLM", "qwen3_moe"), ("MixtralForCausalLM", "mixtral")]
)
def test_each_expert_has_the_range_of_the_rows_that_it_is_given(class_name: str, model_type: str) -> None:
    model = tiny_models.build(class_name, model_type)
    seen, sites, _ = run(model, tiny_models.inputs_of(model, "causal")[0])
    assert len(seen.experts) > 20
    ports = {"gate_up_proj": ("input", "gate_up"), "down_proj": ("hidden", "output")}
    for (parameter, side, expert), extent in seen.experts.items():
        module, _, own = parameter.rpartition(".")
        port = ports[own][side == "makes"]
        assert extent_of(sites, f"{module}:{port}@{expert}") == extent
    measured = {n for n, site in sites.items() if site.expert is not None}
    assert len(measured) == len(seen.experts)
