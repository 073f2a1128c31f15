# SPDX-License-Identifier: Apache-2.0
"""What a consumer is run on: text, and where that does not suffice what the model's configuration asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from calib.errors import ModelError
from calib.export.compare import first_output
from calib.export.emulate import float_model
from calib.export.read_compressed_tensors import CompressedCheckpoint
from calib.export.trial_inputs import trial_inputs

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 60, "max_position_embeddings": 20}
T5: dict[str, Any] = {"vocab_size": 60, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2}
WHISPER: dict[str, Any] = {
    "vocab_size": 60, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 20,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3,
}  # fmt: skip


def clip() -> Any:
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=PICTURES)).eval()


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), {"input_ids"}),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**PICTURES)), {"pixel_values"}),
        (clip, {"input_ids", "pixel_values"}),
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
            {"input_ids", "decoder_input_ids"},
        ),
        (
            lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
            {"input_features", "decoder_input_ids"},
        ),
    ],
    ids=["bert", "vit", "clip", "t5", "whisper"],
)
def test_a_model_runs_on_what_is_made_up_for_it(build: Any, names: set[str]) -> None:
    model = build().eval()
    inputs, again = trial_inputs(model), trial_inputs(model)
    assert set(inputs) == names
    assert all(torch.equal(inputs[name], again[name]) for name in names)
    with torch.no_grad():
        assert first_output(model(**inputs)).isfinite().all()


def test_a_model_that_runs_on_nothing_of_the_kind_says_why() -> None:
    class Other(nn.Module):
        config = transformers.ViTConfig(**PICTURES)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            raise ValueError("wants depth")

    with pytest.raises(ModelError, match=r"Other: no inputs .*pixel_values: wants depth\); pass --no-run"):
        trial_inputs(Other())


def test_a_scale_of_the_model_itself_is_a_weight(tmp_path: Path) -> None:
    """CLIP learns a `logit_scale`, which is none that the format added."""
    model = clip()
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    loaded = float_model(CompressedCheckpoint(tmp_path, config, model=clip()))
    inputs = trial_inputs(model)
    with torch.no_grad():
        assert torch.equal(first_output(loaded(**inputs)), first_output(model(**inputs)))
