# SPDX-License-Identifier: Apache-2.0
"""Consumers in environments of their own, `make test-consumers`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file

from calib.corpus import build_blocks
from calib.cures.input_rotation import InputRotation
from calib.cures.rotate import OnlineRotation
from calib.export import export_scales
from calib.export.emulate import compressed_tensors_plan
from calib.export.imatrix import gguf_names, input_energies
from calib.export.importing import import_scales
from calib.export.linears import FUSED
from calib.export.onnx_emulate import token_feed
from calib.export.onnx_lint import session
from calib.export.read_aimet import read_aimet
from calib.export.read_compressed_tensors import CompressedLinear, read_compressed_tensors
from calib.export.read_onnx import QdqGraph, read_onnx
from calib.measurement import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import QuantizedModel
from calib.scales import choose_scales, load_scales
from tests.export.conftest import Lab, lab

ROOT = Path(__file__).parents[2]
_FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
IN_16_BITS = "avx2" in _FLAGS and not _FLAGS & {"avx512_vnni", "avx_vnni"}
"""Whether this processor multiplies 8-bit numbers as x86 did before VNNI."""


def python_of(name: str) -> str:
    path = ROOT / ".consumers" / name / "bin" / "python"
    if not path.is_file():
        pytest.skip(f"no environment of {name}; run `make consumer-{name}`")
    return str(path)


def run(name: str, *arguments: str | Path) -> str:
    """Runs a script of benchmarks/consumers in the environment of a consumer."""
    path = ROOT / "benchmarks" / "consumers" / f"{name}_run.py"
    command = [python_of(name), str(path), *map(str, arguments)]
    environment = {**os.environ, **VLLM, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


VLLM = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
IN_VLLM = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def wide_llama(tokenizer: Any, folder: Path) -> Path:
    """vLLM's attention wants heads of 32 channels at least: two layers with 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokens_of(held: Lab, path: Path) -> Path:
    """The blocks that `lab` measured, for a consumer that calibrates itself."""
    blocks = build_blocks(["builtin:speeches"], held.opened.tokenizer, samples=4, max_length=32)
    path.write_text(json.dumps(blocks.input_ids.tolist()))
    return path


@pytest.mark.consumer
def test_scales_that_llm_compressor_chose_itself_are_imported_and_are_ours(llama: Lab, tmp_path: Path) -> None:
    tokens = tokens_of(llama, tmp_path / "tokens.json")
    run("llmcompressor", "calibrate", llama.opened.folder, tokens, tmp_path / "theirs")
    export_scales(llama.scales(), tmp_path / "ours", llama.opened, to="compressed-tensors")
    theirs, ours = import_scales(tmp_path / "theirs"), import_scales(tmp_path / "ours")
    assert len(theirs.tensors) == 2 * 21
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert np.allclose(tensor.scale, ours.tensors[name].scale, rtol=1e-5, atol=0), name
        assert tensor.scheme == ours.tensors[name].scheme
    assert theirs.ignore == ours.ignore == ["lm_head"]


@pytest.mark.consumer
def test_our_checkpoint_gives_our_logits_in_the_environment_of_llm_compressor(llama: Lab, tmp_path: Path) -> None:
    tokens = tokens_of(llama, tmp_path / "tokens.json")
    export_scales(llama.scales(), tmp_path / "ours", llama.opened, to="compressed-tensors")
    run("llmcompressor", "read", tmp_path / "ours", tokens, tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")["logits"]
    ids = torch.tensor(json.loads(tokens.read_text()))
    plan = compressed_tensors_plan(read_compressed_tensors(tmp_path / "ours"))
    opened = open_model(llama.opened.folder, device="cpu", dtype="float32")
    with torch.no_grad(), QuantizedModel(opened.model, plan):
        ours = opened.model(input_ids=ids).logits.numpy()
    assert np.abs(found - ours).max() == 0


@pytest.mark.consumer
def test_optimum_takes_our_ranges_and_makes_our_scales_of_them(bert: Lab, tmp_path: Path) -> None:
    summary = export_scales(bert.scales(), tmp_path / "table", bert.opened, to="ort-calibration")
    feed = token_feed(QdqGraph(onnx.load(tmp_path / "table" / "model.onnx")), tmp_path / "table")
    np.savez(tmp_path / "feed.npz", **feed)
    run("optimum", tmp_path / "table", tmp_path / "feed.npz", tmp_path / "out")
    found = read_onnx(tmp_path / "out" / "model_quantized.onnx")
    overrides = json.loads((tmp_path / "table" / "overrides.json").read_text())
    assert found.problems == []
    assert len(found.linears) == len(summary.quantized) == 13
    aliases = load_scales(tmp_path / "table").aliases["onnx"]
    for linear in found.linears.values():
        assert linear.source in aliases.values()
        assert np.isclose(linear.scale, overrides[linear.source]["scale"], rtol=1e-6)
        assert linear.zero_point == 0


@pytest.mark.consumer
def test_modelopt_writes_the_checkpoint_that_we_write(llama: Lab, tmp_path: Path) -> None:
    """Except that our fused siblings have one weight scale, the largest: readers that fuse them need one anyway."""
    tokens = tokens_of(llama, tmp_path / "tokens.json")
    run("modelopt", llama.opened.folder, tokens, tmp_path / "theirs")
    export_scales(llama.scales(), tmp_path / "ours", llama.opened, to="modelopt")
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    widened = set()
    for name in theirs:
        parent, _, leaf = name.removesuffix(".weight_scale").rpartition(".")
        group = next((g for g in FUSED if leaf in g and name.endswith("_scale")), ())
        if group:
            largest = max(theirs[f"{parent}.{other}.weight_scale"] for other in group)
            assert torch.isclose(largest, ours[name], rtol=1e-6), name
            widened |= {name, name.removesuffix("_scale")} if largest != theirs[name] else set()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name
        if name not in widened:
            assert torch.allclose(tensor.float(), ours[name].float(), rtol=1e-6, atol=0), name
    assert len(widened) == 2 * 9  # of five fused layers in each block, three do not have the largest scale
    settings = [json.loads((tmp_path / who / "hf_quant_config.json").read_text()) for who in ("theirs", "ours")]
    left = [set(one["quantization"].pop("exclude_modules")) for one in settings]
    assert left[0] - {"model.embed_tokens"} == left[1]
    assert settings[0]["quantization"] == settings[1]["quantization"]


def in_16_bits(inputs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Inputs ``[rows, in]`` moved to 0..255 times codes ``[out, in]``, sums of two neighbouring products saturating."""
    pairs = (inputs + 128).unflatten(1, (-1, 2))[:, None] * codes.unflatten(1, (-1, 2))
    return pairs.sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * codes.sum(1)


@pytest.mark.consumer
def test_vllm_holds_every_scale_and_multiplies_in_integers(llama: Lab, tmp_path: Path) -> None:
    held = lab(wide_llama(llama.opened.tokenizer, tmp_path / "model"))
    export_scales(held.scales(), tmp_path / "int8", held.opened, to="compressed-tensors")
    tokens = tokens_of(held, tmp_path / "tokens.json")
    run("vllm", tmp_path / "int8", tokens, tmp_path / "out.json")
    checkpoint = read_compressed_tensors(tmp_path / "int8")
    scales = json.loads((tmp_path / "out.json").read_text())["scales"]
    outputs = load_file(tmp_path / "out.json.layers.safetensors")
    assert {value for name, value in scales.items() if name.endswith(".kernel")} == {"CPUInt8ScaledMMLinearKernel"}
    assert len(outputs) == 4 * held.opened.model.config.num_hidden_layers
    for name, output in outputs.items():
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in IN_VLLM.get(leaf, (leaf,))]
        layers = [checkpoint.linears[part] for part in parts]
        assert {scales[f"{name}.input_scale"]} == {layer.input_scale for layer in layers}, name
        fused = CompressedLinear(
            torch.cat([layer.codes for layer in layers]),
            torch.cat([layer.weight_scale for layer in layers]),
            layers[0].input_scale,
            input_zero_point=0,
        )
        x = torch.randn(4, fused.codes.shape[1], generator=torch.Generator().manual_seed(0)) * (fused.input_scale * 60)
        assert distance(output, fused, x) < 1e-6 * float(output.abs().max()), name


def distance(output: torch.Tensor, layer: CompressedLinear, x: torch.Tensor) -> float:
    """Largest difference between an output and that of exact integers, or of the 16 bits that x86 had before VNNI."""
    inputs = (x / layer.input_scale).round().clamp(-128, 127).double()
    products = [inputs @ layer.codes.double().T, *([in_16_bits(inputs, layer.codes.double())] if IN_16_BITS else [])]
    step = layer.input_scale * layer.weight_scale.double().reshape(-1)
    return min(float((output.double() - product * step).abs().max()) for product in products)


@pytest.mark.consumer
def test_vllm_rotates_the_inputs_that_the_checkpoint_names(llama: Lab, tmp_path: Path) -> None:
    model = wide_llama(llama.opened.tokenizer, tmp_path / "model")
    opened = open_model(model, device="cpu")
    rotation = OnlineRotation.by_role(opened.model)
    rotation.apply(opened.model)
    opened = opened.cured([rotation.record().model_dump_json()])
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=4, max_length=32)
    scales = choose_scales(measure(opened, blocks, MeasureOptions()))
    scales = scales.model_copy(update={"cures": [rotation.record()]})
    export_scales(scales, tmp_path / "int8", opened, to="compressed-tensors")
    tokens = tokens_of(Lab(opened, llama.measurement), tmp_path / "tokens.json")
    run("vllm", tmp_path / "int8", tokens, tmp_path / "out.json")
    checkpoint = read_compressed_tensors(tmp_path / "int8")
    outputs = load_file(tmp_path / "out.json.layers.safetensors")
    assert set(rotation.modules) <= outputs.keys()
    for name in rotation.modules:
        layer = checkpoint.linears[name]
        width = layer.codes.shape[1]
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * (layer.input_scale * 60)
        rotated, plain = (distance(outputs[name], layer, rows) for rows in (InputRotation(width).rotate(x), x))
        one_code = 127 * layer.input_scale * float(layer.weight_scale.max())  # a value between two may take the other
        assert rotated <= one_code, name
        assert plain > 10 * one_code, name


@pytest.mark.consumer
@pytest.mark.parametrize("variant", ["gguf", "dat"])
def test_llama_cpp_reads_the_importance_matrix(variant: str, llama: Lab, tmp_path: Path) -> None:
    reader = ROOT / ".consumers" / "llamacpp" / "imatrix_read"
    if not reader.is_file():
        pytest.skip("no reader of llama.cpp; run `make consumer-llamacpp`")
    export_scales(
        llama.scales(), tmp_path / "out", llama.opened, to=f"imatrix:{variant}", measurement=llama.measurement
    )
    command = [str(reader), str(tmp_path / "out" / f"imatrix.{variant}")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    read = {}
    for line in lines[:-1]:
        name, count, _, *sums = line.split()
        read[name] = np.array(sums, float) / float(count)
    energies = input_energies(llama.measurement)
    names = gguf_names(llama.measurement, list(energies))
    assert read.keys() == set(names.values())
    for module, name in names.items():
        energy, count = energies[module]
        assert np.allclose(read[name], np.asarray(energy).reshape(-1) / count, rtol=1e-6), name
    assert lines[-1].split()[:2] == ["chunks", "4"]


@pytest.mark.consumer
@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_aimet_simulates_what_the_encodings_say(version: str, symmetric: bool, bert: Lab, tmp_path: Path) -> None:
    scales = bert.scales(symmetric=symmetric)
    export_scales(scales, tmp_path / "aimet", bert.opened, to=f"aimet:{version}")
    feed = token_feed(QdqGraph(onnx.load(tmp_path / "aimet" / "model.onnx")), tmp_path)
    np.savez(tmp_path / "feed.npz", **feed)
    run("aimet", tmp_path / "aimet", tmp_path / "feed.npz", tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    assert set(found["enabled"]) == set(read_aimet(tmp_path / "aimet" / "model.encodings"))
    ours = session(rounded(tmp_path / "aimet"), plain=True).run(None, feed)[0]
    plain = session(tmp_path / "aimet" / "model.onnx").run(None, feed)[0]
    assert np.abs(found["output"] - ours).max() < 0.01 * np.abs(ours).max()
    assert np.abs(found["output"] - plain).max() > 0


def rounded(folder: Path) -> bytes:
    """The float graph with every tensor that has an encoding rounded for all of its readers, as AIMET does it."""
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    new = []
    for name, one in read_aimet(folder / "model.encodings").items():
        if one.parameter:
            values = numpy_helper.to_array(constants[name])
            scale = np.array(one.scale, np.float32)
            codes = np.clip(np.rint(values / scale), -128, 127)
            constants[name].CopyFrom(numpy_helper.from_array((codes * scale).astype(np.float32), name))
            continue
        for node in graph.node:
            for place, taken in enumerate(node.input):
                if taken == name:
                    node.input[place] = f"{name}/rounded"
        grid = [f"{name}/scale", f"{name}/point"]
        values = (np.array(one.scale[0], np.float32), np.array(one.zero_point, np.int8))
        graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(values, grid, strict=True))
        new.append((name, [
            helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/codes"]),
            helper.make_node("DequantizeLinear", [f"{name}/codes", *grid], [f"{name}/rounded"]),
        ]))  # fmt: skip
    nodes = []
    after = dict(new)
    for node in graph.node:
        nodes.append(node)
        for output in node.output:
            nodes += after.get(output, [])
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())
