# SPDX-License-Identifier: Apache-2.0
"""Models that formats met late: half precision, layers called again, inputs of two dimensions, names of a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calib.corpus import build_blocks
from calib.errors import ModelError
from calib.export import export_scales, verify_export
from calib.export.compressed_tensors import why_no_checkpoint
from calib.export.imatrix import gguf_names
from calib.export.linears import LinearRange, linear_ranges
from calib.export.ort_calibration import tensor_ranges
from calib.export.torchao import apply_torchao
from calib.measurement.engine import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import plan_from_scales
from calib.scales import load_scales
from tests.export.conftest import Lab, lab
from tests.export.test_formats import export


def test_torchao_takes_inputs_of_any_dimensions() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16)).eval()
    expected = model[0](torch.ones(3, 32))
    apply_torchao(model, {"0": 1 / 127.5})
    with torch.no_grad():
        for shape in ((3, 32), (1, 3, 32), (1, 1, 3, 32), (3, 32)):  # a pooler, a layer of a block, again a pooler
            found = model(torch.ones(shape))
            assert found.shape == (*shape[:-1], 16)
            torch.testing.assert_close(found.reshape(3, 16), expected, rtol=0.05, atol=0.02)


@pytest.fixture(scope="module")
def albert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """An ALBERT: two layers that are one module."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    folder = tmp_path_factory.mktemp("albert")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = AlbertConfig(
        vocab_size=len(tokenizer["model"]["vocab"]), embedding_size=32, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    AlbertForMaskedLM(config).save_pretrained(folder)
    return lab(folder, samples=2, max_length=16)


@pytest.fixture(scope="module")
def half(tiny_llama: Path) -> Lab:
    opened = open_model(tiny_llama, device="cpu", dtype="bfloat16")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=16)
    return Lab(opened, measure(opened, blocks, MeasureOptions()))


def test_torchao_runs_a_model_in_half_precision(half: Lab, tmp_path: Path) -> None:
    folder = export(half, tmp_path / "out", "torchao")
    report = verify_export(folder, model=half.opened).consumer
    assert report is not None
    assert report.problems == []
    assert next(half.opened.model.parameters()).dtype == torch.bfloat16  # it is compared in a copy


@pytest.mark.parametrize("to", ["onnx-qdq", "openvino"])
def test_graphs_in_integers_refuse_half_precision_before_they_export(to: str, half: Lab, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"was measured in bfloat16.*--dtype float32"):
        export(half, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_the_graph_covers_every_call_and_every_layer_that_reads_it() -> None:
    ranges = {"q": LinearRange("q", -1.0, 2.0, True), "v": LinearRange("v", -3.0, 1.0, False)}
    aliases = {"q:input": "first", "v:input": "first", "q:input#1": "second", "gone:input": "third"}
    assert tensor_ranges(aliases, ranges) == {
        "first": LinearRange("first", -3.0, 2.0, False),
        "second": LinearRange("second", -1.0, 2.0, True),
    }


def test_a_layer_that_is_called_twice_has_an_override_for_each_call(albert: Lab, tmp_path: Path) -> None:
    folder = export(albert, tmp_path / "out", "ort-calibration")
    assert verify_export(folder, run=False).problems == []
    names = load_scales(folder).aliases["onnx"]
    shared = [name for name in names if name.endswith("ffn:input#1")]
    assert len(shared) == 1
    assert names[shared[0]] != names[shared[0].removesuffix("#1")]


def test_llama_cpp_knows_the_text_half_of_a_model_by_the_name_of_the_whole(llama: Lab) -> None:
    pytest.importorskip("gguf")
    weights = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]

    def of(kind: str) -> Any:
        model = llama.measurement.model.model_copy(update={"model_type": kind})
        return replace(llama.measurement, model=model)

    assert gguf_names(of("gemma3_text"), weights) == {
        weights[0]: "blk.0.attn_q.weight",
        weights[1]: "blk.1.ffn_down.weight",
    }
    with pytest.raises(ModelError, match="knows no architecture xlnet"):
        gguf_names(of("xlnet"), weights)


def mixture(tiny_llama: Path, folder: Path, name: str, config: str, **settings: Any) -> Lab:
    """A model with two layers of four experts each, and the tokenizer of the tiny Llama."""
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    made = getattr(transformers, config)(
        vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"], hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    getattr(transformers, name)(made).save_pretrained(folder)
    return lab(folder)


@pytest.fixture(scope="module")
def llama4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Its router is a linear layer."""
    settings = {"num_attention_heads": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
    folder = tmp_path_factory.mktemp("llama4")
    return mixture(tiny_llama, folder, "Llama4ForCausalLM", "Llama4TextConfig", **settings)


@pytest.fixture(scope="module")
def jetmoe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Experts in attention too; a router holds a linear layer and chooses after it."""
    settings = {"kv_channels": 16, "num_experts_per_tok": 2}
    return mixture(tiny_llama, tmp_path_factory.mktemp("jetmoe"), "JetMoeForCausalLM", "JetMoeConfig", **settings)


@pytest.mark.parametrize(("name", "layer"), [("llama4", "feed_forward.router"), ("jetmoe", "mlp.router.layer")])
def test_routers_stay_in_float(name: str, layer: str, request: pytest.FixtureRequest) -> None:
    found: Lab = request.getfixturevalue(name)
    routers = [n for n, _ in found.opened.model.named_modules() if n.endswith(layer)]
    assert len(routers) == 2
    scales = found.scales()
    readers = {reader for n, tensor in scales.tensors.items() for reader in (n, *tensor.shared_with)}
    assert readers.isdisjoint(f"{router}:weight" for router in routers)
    assert set(routers) <= set(scales.ignore)
    for plan in (plan_from_scales(found.opened.model, scales), plan_from_scales(found.opened.model, inputs="none")):
        assert plan.weights.keys().isdisjoint(routers)
        assert plan.inputs.keys().isdisjoint(routers)
        assert set(routers) <= set(plan.left_out)
    assert set(routers) <= set(linear_ranges(scales, found.opened.model).in_float)
    without = scales.model_copy(update={"ignore": []})  # chosen before this was the rule, or by another tool
    assert set(routers) <= set(linear_ranges(without, found.opened.model).in_float)


def test_a_checkpoint_whose_modules_transformers_would_replace_is_refused(llama4: Lab, tmp_path: Path) -> None:
    scales = llama4.scales()
    why = why_no_checkpoint(scales, llama4.opened.model)
    assert why is not None
    assert "transformers replaces Llama4TextExperts" in why
    with pytest.raises(ModelError, match="transformers replaces Llama4TextExperts"):
        export(llama4, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt", "sglang-kv"])
def test_no_scales_of_keys_and_values_where_no_reader_holds_them(to: str, bert: Lab, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="readers of this format hold no scales of keys and values"):
        export(bert, tmp_path / "out", to, kv_cache=True)
    assert not (tmp_path / "out").exists()


def test_scales_of_keys_and_values_without_the_model(bert: Lab, llama: Lab, tmp_path: Path) -> None:
    scales = llama.scales()
    export_scales(scales, tmp_path / "kv", to="sglang-kv")
    assert load_scales(tmp_path / "kv").model == scales.model
    towers = {f"tower.{name}": tensor for name, tensor in scales.tensors.items() if name.endswith((":key", ":value"))}
    towers |= {"tower.model.layers.0.self_attn.k_proj:input": next(iter(scales.tensors.values()))}
    with pytest.raises(ModelError, match="second attention of layer 0"):
        export_scales(
            scales.model_copy(update={"tensors": {**scales.tensors, **towers}}), tmp_path / "two", to="sglang-kv"
        )
    assert not (tmp_path / "two").exists()
    with pytest.raises(ModelError, match="readers of this format hold no scales of keys and values"):
        export_scales(bert.scales(), tmp_path / "out", to="sglang-kv")
