# SPDX-License-Identifier: Apache-2.0
"""What was not measured ends in exit code 3 and one line that names it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tiny_models
from tests.cli.commands import SMALL, one_line, run


def saved(model: Any, tokenizer_of: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of the tiny models has 300 tokens."""
    monkeypatch.setattr(tiny_models, "VOCABULARY", 320)
    monkeypatch.setitem(tiny_models._EXACT, "vocab_size", 320)


def test_an_expert_without_tokens(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build("GptOssForCausalLM", "gpt_oss")
    model.get_submodule("model.layers.1.mlp.router").bias.data[2] = -1e9
    folder = saved(model, tiny_llama, tmp_path / "model")
    assert run("measure", folder, "-o", tmp_path / "m", *SMALL, "-q") == 3
    line = one_line(capsys.readouterr().err)
    assert "gate every_expert_routed failed" in line
    assert "model.layers.1.mlp.experts@2 (0 tokens)" in line
    assert run("quantize", tmp_path / "m", "-o", tmp_path / "int8", "-q") == 3
    assert "model.layers.1.mlp.experts@2" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "int8").exists()


def test_text_alone_for_a_model_that_reads_images(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tiny_models.build("LlavaForConditionalGeneration", "llava"), tiny_llama, tmp_path / "model")
    assert run("measure", folder, "-o", tmp_path / "m", *SMALL, "-q") == 3
    assert "model.vision_tower" in one_line(capsys.readouterr().err)


def test_a_layer_whose_keys_are_not_seen(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer computes its attention by itself, as a patched model may."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    original = LlamaAttention.forward

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx != 1:
            return original(self, hidden_states, *args, **kwargs)
        queries, keys = self.q_proj(hidden_states), self.k_proj(hidden_states)
        return self.o_proj(queries * keys.mean() + self.v_proj(hidden_states).repeat(1, 1, 2)), None

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL, "-q") == 3
    line = one_line(capsys.readouterr().err)
    assert "model.layers.1.self_attn:key" in line
    assert "model.layers.0.self_attn:key" not in line


def test_attention_that_cannot_be_looked_into_is_named(tiny_llama: Path) -> None:
    from calib.measurement import Calibration

    model = tiny_models.build("LlamaForCausalLM", "llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.__class__ = type("Own", (type(attention),), {"forward": _own_forward})
    with torch.no_grad(), Calibration(model) as calibration:
        model(torch.arange(12)[None])
    gate = next(g for g in calibration.gates() if g.name == "every_cache_seen")
    assert not gate.passed
    assert gate.names == ("model.layers.1.self_attn",)


def _own_forward(self: Any, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
    self.k_proj(hidden_states)
    return self.o_proj(self.q_proj(hidden_states) + self.v_proj(hidden_states).repeat(1, 1, 2)), None


def test_a_model_that_overflows_float16_is_told_of_another_dtype(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for part in ("gate_proj", "up_proj"):
        model.get_submodule(f"model.layers.1.mlp.{part}").weight.data.mul_(2000.0)
    folder = saved(model, tiny_llama, tmp_path / "model")
    assert run("measure", folder, "-o", tmp_path / "half", *SMALL, "-q", "--dtype", "float16") == 3
    line = one_line(capsys.readouterr().err)
    assert "gate finite failed" in line
    assert "model.layers.1.mlp" in line
    assert "pass --dtype bfloat16 or float32" in line
    assert run("quantize", tmp_path / "half", "-o", tmp_path / "int8", "-q") == 3
    assert not (tmp_path / "int8").exists()
    for dtype in ("bfloat16", "float32"):
        assert run("measure", folder, "-o", tmp_path / dtype, *SMALL, "-q", "--dtype", dtype) == 0
