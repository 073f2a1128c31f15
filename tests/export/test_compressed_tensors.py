# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are loaded by transformers and must give, bit for bit, what our own arithmetic gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from calib.corpus import build_blocks
from calib.errors import ArtifactError, GateError, ModelError, UsageError
from calib.export import export_scales, verify_export
from calib.export.checks import CONSUMERS
from calib.export.compare import token_ids
from calib.export.compressed_tensors import write_checkpoint
from calib.export.read_compressed_tensors import has_cache
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel, plan_from_scales
from calib.scales import choose_scales
from calib.schema.scales import CureRecord
from tests.export.conftest import Lab


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


@pytest.mark.parametrize("to", ["compressed-tensors:int8", "compressed-tensors:fp8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_variant_is_bit_exact_with_key_and_value_scales_and_shards(
    to: str, symmetric: bool, llama: Lab, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    summary = export_scales(
        llama.scales(symmetric=symmetric), folder, llama.opened, to=to, kv_cache=True, shard_size="100KB"
    )
    assert len(summary.kv_cache) == 3
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    found = verify_export(folder)
    assert found.problems == []
    report = found.consumer
    assert report is not None
    assert report.model_difference == report.layer_difference == 0
    assert report.scales_read == report.scales == 21 + 6
    assert report.layers_exact == report.layers == 21


def test_a_damaged_scale_shows_in_the_consumer_too(llama: Lab, tmp_path: Path) -> None:
    from calib.export.check_compressed_tensors import run_transformers

    export_scales(llama.scales(), tmp_path / "a", llama.opened, to="compressed-tensors")
    export_scales(llama.scales(method="percentile:90"), tmp_path / "b", llama.opened, to="compressed-tensors")
    good, other = (run_transformers(tmp_path / name, None) for name in "ab")
    assert good.problems == other.problems == []
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    assert verify_export(tmp_path / "a", run=False).problems


def test_ranges_of_fused_siblings_are_unified_and_said(llama: Lab, tmp_path: Path) -> None:
    scales = llama.scales()
    name = "model.layers.0.self_attn.q_proj"
    tensors = dict(scales.tensors)
    holder = next(n for n, t in tensors.items() if f"{name}:input" in [n, *t.shared_with])
    entry = tensors.pop(holder)
    names = [holder, *entry.shared_with]
    narrow = entry.model_copy(update={"range_max": entry.range_max / 2, "range_min": entry.range_min / 2})
    for reader in names:
        tensors[reader] = (narrow if "v_proj" in reader else entry).model_copy(update={"shared_with": []})
    edited = scales.model_copy(update={"tensors": tensors})
    summary = export_scales(edited, tmp_path / "out", llama.opened, to="compressed-tensors")
    assert [note for note in summary.notes if "v_proj" in note and "widened" in note]
    assert verify_export(tmp_path / "out").problems == []


def test_a_layer_whose_fused_sibling_is_in_float_stays_in_float(llama: Lab, tmp_path: Path) -> None:
    scales = llama.scales().model_copy(update={"ignore": ["model.layers.0.self_attn.k_proj"]})
    summary = export_scales(scales, tmp_path / "out", llama.opened, to="compressed-tensors")
    assert "together with model.layers.0.self_attn.k_proj" in summary.in_float["model.layers.0.self_attn.q_proj"]
    assert verify_export(tmp_path / "out").problems == []


def test_what_does_not_belong_together_is_refused(llama: Lab, bert: Lab, tmp_path: Path) -> None:
    scales, to = llama.scales(), "compressed-tensors"
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="another model"):
        export_scales(scales, out, bert.opened, to=to)
    stranger = scales.model_copy(update={"model": scales.model.model_copy(update={"tokenizer_sha256": "0" * 64})})
    with pytest.raises(ArtifactError, match="tokenizer"):
        export_scales(stranger, out, llama.opened, to=to)
    with pytest.raises(ArtifactError, match="cannot express the cure 'prefix'"):
        export_scales(
            scales.model_copy(update={"cures": [CureRecord(kind="prefix", summary="")]}), out, llama.opened, to=to
        )
    compensated = scales.model_copy(update={"cures": [CureRecord(kind="compensate", summary="s")]})
    with pytest.raises(ArtifactError, match="scales alone do not hold them"):
        export_scales(compensated, out, llama.opened, to=to)
    half = scales.model_copy(update={"model": scales.model.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(GateError, match="measured in bfloat16"):
        export_scales(half, out, llama.opened, to=to)
    with pytest.raises(UsageError, match="--model"):
        export_scales(scales, out, to=to)
    with pytest.raises(UsageError, match="unknown"):
        export_scales(scales, out, llama.opened, to="safetensor")
    with pytest.raises(UsageError, match="no variant"):
        export_scales(scales, out, llama.opened, to="compressed-tensors:int3")
    with pytest.raises(ModelError, match="no keys and values"):
        export_scales(bert.scales(sites=["linear_input", "*:weight"]), out, bert.opened, to=to, kv_cache=True)
    assert not out.exists()


def test_keys_and_values_that_readers_hold_no_scales_of_are_refused(llama: Lab, bert: Lab, tmp_path: Path) -> None:
    to, out = "compressed-tensors", tmp_path / "out"
    with pytest.raises(ModelError, match=r"no scales of keys and values for BertSelfAttention; export without"):
        export_scales(bert.scales(), out, bert.opened, to=to, kv_cache=True)
    scales = llama.scales()
    latent = {n.replace(":key", ":cache_key"): tensor for n, tensor in scales.tensors.items() if n.endswith(":key")}
    assert latent
    cached = scales.model_copy(update={"tensors": {**scales.tensors, **latent}})
    for name in (to, "sglang-kv", "modelopt"):
        with pytest.raises(ModelError, match="caches a latent"):
            export_scales(cached, out, llama.opened, to=name, kv_cache=True)
    assert has_cache(llama.opened.model, llama.opened.model.get_submodule("model.layers.0.self_attn"))
    with torch.device("meta"):
        opt = transformers.OPTForCausalLM(transformers.OPTConfig(num_hidden_layers=1))
    # it has k_proj and takes a cache, but compressed-tensors stops at a configuration without num_key_value_heads
    assert not has_cache(opt, opt.get_submodule("model.decoder.layers.0.self_attn"))
    assert not out.exists()


def test_a_consumer_that_stops_is_a_finding(llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    export_scales(llama.scales(), folder, llama.opened, to="compressed-tensors")

    def stop(*_: object) -> Any:
        raise NotImplementedError("no kernel\nof a long story")

    monkeypatch.setitem(CONSUMERS, "transformers", replace(CONSUMERS["transformers"], run=stop))
    found = verify_export(folder)
    assert found.problems == ["transformers: cannot load or run it (NotImplementedError: no kernel)"]


def test_token_ids_of_a_model_without_a_longest_sequence() -> None:
    model = nn.Module()
    text = SimpleNamespace(vocab_size=9, max_position_embeddings=-1)  # XLNet
    model.config = SimpleNamespace(get_text_config=lambda: text)
    assert token_ids(model).shape == (2, 32)
    text.max_position_embeddings = 5
    assert token_ids(model).shape == (2, 5)
