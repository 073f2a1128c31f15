# SPDX-License-Identifier: Apache-2.0
"""`calib quantize --cure auto` on architectures that compute in their own ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.cli.commands import run

VOCABULARY = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def qwen3() -> PreTrainedModel:
    """Its heads are as wide together as the residual stream, and their norms read them one by one."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16))


def gpt2() -> PreTrainedModel:
    """`Conv1D` takes views of its input; no layer fits a compressed-tensors checkpoint."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def deepseek() -> PreTrainedModel:
    """Latent keys and values have an axis for their one head."""
    latent = {"q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    more = {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **latent, **experts, **more))


@pytest.mark.parametrize(("build", "checkpoint"), [(qwen3, True), (gpt2, False), (deepseek, True)])
def test_auto_cures_it_and_the_checkpoint_passes(
    build: Any, checkpoint: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (16, 24)).tolist()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    out = tmp_path / "int8"
    given = ["-d", rows, "--samples", 8, "--max-length", 24, "--device", "cpu", "--target", 1.0]
    assert run("quantize", tmp_path / "model", "-o", out, "--cure", "auto", *given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (out / "scales.json").is_file()
    assert (out / "model.safetensors").exists() == checkpoint
    if checkpoint:
        assert run("verify", out, "-q") == 0
    else:
        assert "no checkpoint: model: no linear layer has a static scale of its input (a Conv1D" in said
