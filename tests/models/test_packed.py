# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are quantized already: GPTQ and AWQ are multiplied out here, others by transformers, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks import tiny_models
from calib.corpus import TokenBlocks, build_blocks
from calib.errors import ModelError
from calib.measurement import MeasureOptions, measure
from calib.models import open_model
from tests.cli.commands import SMALL, one_line, run

GROUP = 32
OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 20)


def bits_of(codes: list[int], width: int) -> np.int32:
    """One word, the first code in its lowest bits."""
    word = sum(int(code) << (width * place) for place, code in enumerate(codes))
    return np.uint32(word).astype(np.int32)


def gptq_layer(rng: Any, outputs: int, inputs: int, bits: int, offset: int, order: bool) -> tuple[dict, torch.Tensor]:  # type: ignore[type-arg]
    """A packed layer and the weight that it stands for, one word after the other, as the format is described."""
    groups, per = inputs // GROUP, 32 // bits
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = rng.integers(1, 2**bits, (groups, outputs))
    scales = torch.tensor(rng.uniform(0.001, 0.02, (groups, outputs)), dtype=torch.float16)
    index = rng.permutation(inputs) // GROUP if order else np.arange(inputs) // GROUP
    words = [[bits_of(list(codes[i : i + per, o]), bits) for o in range(outputs)] for i in range(0, inputs, per)]
    points = [
        [bits_of(list(zeros[g, o : o + per] - offset), bits) for o in range(0, outputs, per)] for g in range(groups)
    ]
    weight = torch.empty(outputs, inputs)
    for i in range(inputs):
        row = torch.tensor(codes[i] - zeros[index[i]]).float() * scales[index[i]].float()
        weight[:, i] = row
    packed = {
        "qweight": torch.tensor(np.array(words)),
        "qzeros": torch.tensor(np.array(points)),
        "scales": scales,
        "g_idx": torch.tensor(index.astype(np.int32)),
    }
    return packed, weight


def awq_layer(rng: Any, outputs: int, inputs: int) -> tuple[dict, torch.Tensor]:  # type: ignore[type-arg]
    groups, order = inputs // GROUP, [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scales = torch.tensor(rng.uniform(0.001, 0.02, (groups, outputs)), dtype=torch.float16)

    def packed(table: Any) -> torch.Tensor:
        rows = [[bits_of([row[o + place] for place in order], 4) for o in range(0, outputs, 8)] for row in table]
        return torch.tensor(np.array(rows))

    weight = torch.stack([
        torch.tensor(codes[i] - zeros[i // GROUP]).float() * scales[i // GROUP].float() for i in range(inputs)
    ])  # fmt: skip
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, weight.T.contiguous()


def packed_llama(source: Path, folder: Path, kind: str, **settings: Any) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint whose linear layers are packed; returns the weights that they stand for."""
    shutil.copytree(source, folder)
    rng = np.random.default_rng(0)
    state = load_file(folder / "model.safetensors")
    weights = {}
    for name in [n for n in state if n.endswith("_proj.weight")]:
        outputs, inputs = state.pop(name).shape
        if kind == "awq":
            parts, weight = awq_layer(rng, outputs, inputs)
        else:
            offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
            parts, weight = gptq_layer(rng, outputs, inputs, settings["bits"], offset, settings["desc_act"])
        layer = name.removesuffix(".weight")
        state |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        weights[name] = weight
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    described(folder, quant_method=kind, group_size=GROUP, **settings)
    return weights


def described(folder: Path, **quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gptq", {"bits": 4, "desc_act": False}),
        ("gptq", {"bits": 4, "desc_act": True, "checkpoint_format": "gptq"}),
        ("gptq", {"bits": 4, "desc_act": False, "checkpoint_format": "gptq_v2"}),
        ("gptq", {"bits": 8, "desc_act": False}),
        ("gptq", {"bits": 2, "desc_act": True}),
        ("awq", {"bits": 4, "version": "gemm", "zero_point": True}),
    ],
)
def test_packed_weights_are_multiplied_out_and_measured(
    kind: str, settings: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    weights = packed_llama(tiny_llama, tmp_path / "packed", kind, **settings)
    opened = open_model(tmp_path / "packed", device="cpu", dtype="float32")
    assert opened.provenance.source_format == f"safetensors:{kind}"
    parameters = dict(opened.model.named_parameters())
    assert len(weights) == 21
    for name, weight in weights.items():
        assert torch.equal(parameters[name], weight), name
    plain = open_model(tiny_llama, device="cpu", dtype="float32")
    plain.model.load_state_dict({**plain.model.state_dict(), **weights})
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=32)
    found, expected = measure(opened, blocks, MeasureOptions()), measure(plain, blocks, MeasureOptions())
    assert found.passed
    for name, site in expected.sites.items():
        span, other = site.statistics.range, found.sites[name].statistics.range
        assert (span.min, span.max, span.count_all) == (other.min, other.max, other.count_all), name


def test_the_command_line_measures_them(tiny_llama: Path, tmp_path: Path) -> None:
    packed_llama(tiny_llama, tmp_path / "packed", "gptq", bits=4, desc_act=False)
    assert run("measure", tmp_path / "packed", "-o", tmp_path / "m", *SMALL, "-q") == 0


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 3}, "packed as usual with 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "packed as marlin with 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "packed as gemv with 4 bits"),
        ({"quant_method": "gptq", "bits": 4}, "no tensor is packed"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_what_to_do(
    quantization: dict[str, Any], says: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    described(tmp_path / "model", **quantization)
    assert run("measure", tmp_path / "model", "-o", tmp_path / "m", *SMALL) == 1
    line = one_line(capsys.readouterr().err)
    assert says in line
    assert "before quantization" in line or "fetch it again" in line


def test_packed_tensors_that_do_not_fit_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    packed_llama(tiny_llama, tmp_path / "packed", "awq", bits=4)
    state = load_file(tmp_path / "packed" / "model.safetensors")
    del state["model.layers.1.mlp.down_proj.scales"]
    save_file(state, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"packed tensors of model.layers.1.mlp.down_proj do not fit"):
        open_model(tmp_path / "packed", device="cpu")


def test_mxfp4_experts_are_multiplied_out_and_measured_one_by_one(tmp_path: Path) -> None:
    model: Any = tiny_models.build("GptOssForCausalLM", "gpt_oss")
    model.save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    rng = np.random.default_rng(0)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = {}
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj")) and "experts" in n]:
        experts, inputs, outputs = state.pop(name).shape
        codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32))
        exponents = rng.integers(120, 124, (experts, outputs, inputs // 32))
        state[f"{name}_blocks"] = torch.tensor((codes[..., 1::2] << 4 | codes[..., ::2]).astype(np.uint8))
        state[f"{name}_scales"] = torch.tensor(exponents.astype(np.uint8))
        values = levels[torch.tensor(codes)] * torch.tensor(2.0 ** (exponents - 127.0)).float()[..., None]
        expected[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    described(tmp_path / "m", quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    opened = open_model(tmp_path / "m", device="cpu", dtype="float32")
    parameters = dict(opened.model.named_parameters())
    assert expected
    for name, weight in expected.items():
        assert torch.equal(parameters[name], weight), name
    measurement = measure(opened, token_blocks(), MeasureOptions(min_expert_tokens=0))
    assert "model.layers.0.mlp.experts:hidden@1" in measurement.sites


@pytest.mark.skipif(OLD, reason="this version imports triton for it")
def test_fp8_blocks_are_multiplied_out_on_a_cpu(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    expected = {}
    for name in [n for n in state if n.endswith("_proj.weight")]:
        scale = torch.full((1, 1), float(state[name].abs().max()) / 448)
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = state[name].float() * scale
        state[f"{name}_scale_inv"] = scale
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    described(tmp_path / "m", quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    opened = open_model(tmp_path / "m", device="cpu", dtype="float32")
    for name, weight in expected.items():
        assert torch.allclose(dict(opened.model.named_parameters())[name], weight, rtol=1e-2, atol=1e-6), name
    assert measure(opened, build_blocks(["builtin:speeches"], opened.tokenizer, samples=1, max_length=16)).passed


def token_blocks() -> TokenBlocks:
    records = [json.dumps({"input_ids": np.random.default_rng(i).integers(3, 100, 64).tolist()}) for i in range(4)]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.jsonl"
        path.write_text("\n".join(records))
        return build_blocks([path], None, samples=4, max_length=64)
