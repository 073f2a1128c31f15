# SPDX-License-Identifier: Apache-2.0
"""Keys and values with one scale per head: written, read back, run, damaged, and where a format has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.errors import ModelError
from calib.export import export_scales, verify_export
from calib.export.importing import import_scales
from tests.export.conftest import Lab


@pytest.mark.parametrize("to", ["compressed-tensors:int8", "compressed-tensors:fp8"])
def test_scales_per_head_are_bit_exact_in_transformers(to: str, llama: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    scales = llama.scales()
    summary = export_scales(scales, folder, llama.opened, to=to, kv_heads=True)
    assert len(summary.kv_cache) == 3
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme["strategy"] == "attn_head"
    state = load_file(folder / "model.safetensors")
    for name in summary.kv_cache:
        heads = scales.tensors[f"{name}:key"].heads
        assert heads is not None
        assert len(heads.scale) == 2
        amax = [max(-low, high) for low, high in zip(heads.min, heads.max, strict=True)]
        assert torch.equal(state[f"{name}.k_scale"], torch.tensor(amax).double().div(448).float().reshape(2, 1, 1))
    assert len({tuple(state[f"{name}.v_scale"].reshape(-1).tolist()) for name in summary.kv_cache}) == 3
    found = verify_export(folder)
    assert found.problems == []
    report = found.consumer
    assert report is not None
    assert report.model_difference == report.layer_difference == 0
    assert report.scales_read == report.scales == 21 + 6
    back = import_scales(folder)
    for name in summary.kv_cache:
        assert back.tensors[f"{name}:value"].heads is not None


def test_scales_per_head_that_are_damaged_are_named(llama: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    summary = export_scales(llama.scales(), folder, llama.opened, to="compressed-tensors", kv_heads=True)
    state = load_file(folder / "model.safetensors")
    name = f"{summary.kv_cache[1]}.k_scale"
    save_file({**state, name: state[name].flip(0).contiguous()}, folder / "model.safetensors", {"format": "pt"})
    assert any(name in problem for problem in verify_export(folder, run=False).problems)
    save_file({**state, name: state[name].reshape(-1)}, folder / "model.safetensors", {"format": "pt"})
    assert any(f"{name}: has shape [2]" in problem for problem in verify_export(folder, run=False).problems)


def test_scales_per_head_need_ranges_of_heads(llama: Lab, tmp_path: Path) -> None:
    scales = llama.scales()
    tensors = {name: tensor.model_copy(update={"heads": None}) for name, tensor in scales.tensors.items()}
    older = scales.model_copy(update={"tensors": tensors})
    with pytest.raises(ModelError, match=r"self_attn: the scale file has no ranges of its heads.*--kv-cache"):
        export_scales(older, tmp_path / "out", llama.opened, to="compressed-tensors", kv_heads=True)
    assert export_scales(older, tmp_path / "old", llama.opened, to="compressed-tensors", kv_cache=True).kv_cache


def test_a_format_without_scales_per_head_says_so(llama: Lab, tmp_path: Path) -> None:
    summary = export_scales(llama.scales(), tmp_path / "out", llama.opened, to="sglang-kv", kv_heads=True)
    assert any("no scales per head" in note for note in summary.notes)
    assert summary.kv_cache
