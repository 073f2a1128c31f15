# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from calib.errors import ModelError
from calib.models import open_model
from calib.models.tasks import task_of_architecture, tasks_of_model_type


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("Qwen3MoeForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
        ("BertForPreTraining", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("ViTForImageClassification", "image-classification"),
        ("DeiTForImageClassification", "image-classification"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("LlavaForConditionalGeneration", "image-text-to-text"),
        ("Gemma3ForConditionalGeneration", "image-text-to-text"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("NobodyKnowsForCausalLM", "text-generation"),
        ("NobodyKnowsThis", None),
        ("LlamaConfig", None),
    ],
)
def test_the_task_follows_from_the_class_name(architecture: str, task: str | None) -> None:
    assert task_of_architecture(architecture) == task


def test_the_tasks_of_a_model_type_come_from_transformers_own_tables() -> None:
    assert {"text-generation", "feature-extraction", "text-classification"} <= set(tasks_of_model_type("llama"))
    assert "image-classification" not in tasks_of_model_type("llama")
    assert tasks_of_model_type("nobody-knows") == []


@pytest.mark.parametrize(
    ("architectures", "message"),
    [(None, "names no architecture; pass --task"), (["Mystery"], "no task is known for architecture Mystery")],
)
def test_without_a_telling_architecture_a_task_must_be_named(
    tiny_llama: Path, tmp_path: Path, architectures: list[str] | None, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        open_model(folder, device="cpu")
    opened = open_model(folder, task="text-generation", device="cpu")
    assert opened.provenance.architecture == "LlamaForCausalLM"
