# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calib.errors import ModelError
from calib.models import open_model

CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class OwnConfig(PreTrainedConfig):
    model_type = "calib_test_own"


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(8, 4)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, **kwargs):
        return BaseModelOutput(last_hidden_state=self.table(input_ids))
"""


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A checkpoint whose classes lie in a Python file beside its weights."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE)
    config = {
        "model_type": "calib_test_own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"table.weight": torch.arange(32.0).reshape(8, 4)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_code_that_a_checkpoint_brings_is_not_run_unasked(own_model: Path) -> None:
    with pytest.raises(
        ModelError, match=r"the Python code it brings \(modeling_own.py\); read it, then --trust-remote"
    ):
        open_model(own_model, device="cpu")


def test_trusted_code_runs(own_model: Path) -> None:
    opened = open_model(own_model, trust_remote_code=True, device="cpu")
    assert opened.provenance.architecture == "OwnForCausalLM"
    assert opened.task == "text-generation"
    assert opened.model(torch.tensor([[7]])).last_hidden_state.tolist() == [[[28.0, 29.0, 30.0, 31.0]]]


def test_a_model_type_that_nobody_knows_is_refused(own_model: Path) -> None:
    (own_model / "config.json").write_text(json.dumps({"model_type": "calib_test_own", "architectures": ["X"]}))
    with pytest.raises(ModelError, match=r"transformers [\d.]+ does not know model_type 'calib_test_own'; update"):
        open_model(own_model, trust_remote_code=True, device="cpu")


def test_a_config_without_model_type_is_refused(own_model: Path) -> None:
    (own_model / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    with pytest.raises(ModelError, match=r"config.json has no model_type"):
        open_model(own_model, device="cpu")
