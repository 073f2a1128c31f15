# SPDX-License-Identifier: Apache-2.0
"""Students whose weights know nothing yet: the configuration of a checkpoint, changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from calib.distill.cmi import measure_information
from calib.distill.data import read_records
from calib.distill.folders import open_classifier
from calib.distill.fresh import fresh_model
from calib.distill.run import run_recipe
from calib.errors import ArtifactError, UsageError
from calib.models import open_model
from calib.schema.distill import DistillRecipe, ModelRecipe

FAST = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0, "schedule": "constant"}


def test_fresh_weights_come_from_the_generator_and_not_from_the_checkpoint(tiny_llama: Path) -> None:
    changes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    found = []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(fresh_model(str(tiny_llama), changes, "text-generation"))
    weights = [one.model.get_input_embeddings().weight for one in found]  # type: ignore[operator]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    config: Any = found[0].model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (1, 32, 16)
    assert found[0].tokenizer is not None
    assert weights[0].dtype == torch.float32
    held = open_model(tiny_llama, device="cpu").model.get_input_embeddings().weight  # type: ignore[operator]
    assert not torch.equal(
        fresh_model(str(tiny_llama), {}, "text-generation").model.get_input_embeddings().weight, held
    )  # type: ignore[operator]


def test_what_follows_from_a_change_follows(tmp_path: Path) -> None:
    """Qwen3 has a head_dim of its own, 128 where none is said, and a type of each layer."""
    from transformers import Qwen3Config

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    kinds = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    Qwen3Config(**sizes, **kinds, num_attention_heads=4, num_key_value_heads=2, head_dim=8).save_pretrained(tmp_path)
    config: Any = fresh_model(str(tmp_path), {"hidden_size": 64}, "text-generation").model.config
    assert config.head_dim == 16
    config = fresh_model(str(tmp_path), {"num_hidden_layers": 5}, "text-generation").model.config
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"layers": 2}, "layers: .* has no such entry"), ({"hidden_size": 30, "num_attention_heads": 4}, "no model can")],
)
def test_changes_that_make_no_model_are_refused(changes: dict[str, Any], said: str, minilm_like: Path) -> None:
    with pytest.raises(UsageError, match=said):
        fresh_model(str(minilm_like), changes, "feature-extraction")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"network": "mlp16", "fresh": {}}, "fresh belongs to"),
        ({"encoder": "x", "layers": 1, "fresh": {}}, "num_hidden_layers"),
    ],
)
def test_fresh_goes_with_a_checkpoint_and_without_layers(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelRecipe.model_validate(fields)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [
        {"text": text, "label": label}
        for text, label in [("the whale swam", "whale"), ("the scale and the error", "scale")] * 10
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_an_encoder_from_scratch_learns_and_is_kept_as_the_classifier_that_was_judged(
    minilm_like: Path, texts: Path
) -> None:
    training = {"epochs": 6, "batch_size": 4, "optimiser": FAST}
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    recipe = DistillRecipe.model_validate(
        {
            "metadata": {"title": "t", "description": "d"},
            "task": "text-classification",
            "data": {"source": str(texts), "max_length": 16},
            "teacher": {"encoder": str(minilm_like), "training": training},
            "mcmi": {"epochs": 1, "optimiser": {**FAST, "learning_rate": 1e-4}},
            "student": {
                "encoder": str(minilm_like),
                "fresh": small,
                "training": training,
                "frameworks": [{"name": "kd"}],
            },
        }
    )
    folder = texts / "out"
    folder.mkdir()
    report = run_recipe(recipe, folder, device="cpu")
    assert all(row.accuracy > 0.9 for row in report.students)
    kept = folder / "student-0-full-kd-mcmi-plain"
    assert open_model(kept, device="cpu").model.config.hidden_size == 16  # an encoder, for transformers
    test = read_records(str(texts), "test")
    for path, accuracy in (
        (kept, report.students[3].accuracy),
        (folder / "teacher-mcmi", report.teachers[2].test["accuracy"]),
    ):
        found = open_classifier(str(path), device="cpu")
        assert (found.class_names, found.max_length) == (["scale", "whale"], 16)
        summary = measure_information(found.model, found.batches(test), task=found.task)[0].summary()
        assert summary.accuracy == accuracy
    assert summary.log_likelihood == pytest.approx(float(report.teachers[2].test["log_likelihood"] or 0), abs=1e-5)
    (kept / "head.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no usable classifier"):
        open_classifier(str(kept), device="cpu")


def test_a_language_student_from_scratch_has_its_own_shape(tiny_llama: Path, tmp_path: Path) -> None:
    training = {"epochs": 6, "batch_size": 4, "optimiser": FAST}
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    recipe = DistillRecipe.model_validate(
        {
            "metadata": {"title": "t", "description": "d"},
            "task": "text-generation",
            "data": {"source": "builtin:speeches", "max_length": 32, "limit": 40, "validation_share": 0.2},
            "teacher": {"model": str(tiny_llama), "fresh": {}, "training": training},
            "mcmi": {"epochs": 1, "batch_size": 4, "optimiser": {**FAST, "learning_rate": 1e-4}},
            "student": {
                "model": str(tiny_llama),
                "fresh": {**small, "num_key_value_heads": 1},
                "training": training,
                "frameworks": [{"name": "kd"}],
            },
        }
    )
    report = run_recipe(recipe, tmp_path, device="cpu")
    log = (tmp_path / "log.csv").read_text()
    assert "seed 0, teacher,6," in log.replace('"', "")  # a fresh teacher is trained first
    kept = open_model(tmp_path / "student-0-full-kd-mll-plain", device="cpu")
    assert kept.model.config.hidden_size == 32
    assert all(float(row.log_likelihood or -9) > -5.6 for row in report.students)  # ln 300 = 5.70 by chance


def test_a_vocabulary_of_another_size_is_refused_before_training(tiny_llama: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "metadata": {"title": "t", "description": "d"},
        "task": "text-generation",
        "data": {"source": "builtin:speeches", "max_length": 32, "limit": 40, "validation_share": 0.2},
        "teacher": {"model": str(tiny_llama)},
        "mcmi": {"epochs": 1, "batch_size": 8, "optimiser": {**FAST, "learning_rate": 1e-4}},
        "student": {
            "model": str(tiny_llama),
            "fresh": {"vocab_size": 320},
            "training": {"epochs": 1, "batch_size": 8, "optimiser": FAST},
            "frameworks": [{"name": "kd"}],
        },
    }
    with pytest.raises(UsageError, match="320"):
        run_recipe(DistillRecipe.model_validate(given), tmp_path, device="cpu")
