# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.distill.cmi import measure_information
from calib.distill.data import read_records
from calib.distill.folders import open_classifier
from calib.distill.networks import TEXT_NETWORKS, make_text_network
from calib.distill.run import run_recipe
from calib.errors import UsageError
from calib.schema.distill import DistillRecipe

FAST = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0, "schedule": "constant"}


@pytest.mark.parametrize("name", sorted(TEXT_NETWORKS))
def test_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = make_text_network(name, 3, vocabulary=50, length=9).eval()
    ids = torch.randint(50, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        together = model(ids, mask)
        alone = model(ids[1:, :5], mask[1:, :5])
        other = model(torch.where(mask == 1, ids, 7), mask)
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together, other, rtol=1e-5, atol=1e-6)
    assert together.shape == (2, 3)


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="unknown for texts; choose one of text_micro, text_micro_clipped"):
        make_text_network("resnet8", 2, vocabulary=9, length=9)


@pytest.fixture
def plan(minilm_like: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [
        {"text": text, "label": label}
        for text, label in [("the whale swam", "whale"), ("the scale and the error", "scale")] * 10
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    training = {"epochs": 6, "batch_size": 4, "optimiser": FAST}
    return {
        "metadata": {"title": "t", "description": "d"},
        "task": "text-classification",
        "data": {"source": str(tmp_path), "max_length": 16},
        "teacher": {"encoder": str(minilm_like), "training": training},
        "mcmi": {"epochs": 1, "optimiser": {**FAST, "learning_rate": 1e-4}},
        "student": {
            "network": "text_micro_gated",
            "training": training,
            "frameworks": [{"name": "kd"}, {"name": "at"}],
        },
    }


def test_a_student_without_sinks_learns_texts_from_an_encoder_and_is_kept(plan: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    report = run_recipe(DistillRecipe.model_validate(plan), folder, device="cpu")
    assert all(row.accuracy > 0.9 for row in report.students)
    kept = open_classifier(str(folder / "student-0-full-kd-mcmi-plain"), device="cpu")
    assert (kept.kind, kept.class_names, kept.max_length) == ("text", ["scale", "whale"], 16)
    test = read_records(str(tmp_path), "test")
    found = measure_information(kept.model, kept.batches(test), task=kept.task)[0].summary()
    assert found.accuracy == report.students[3].accuracy


def test_a_teacher_without_a_tokenizer_has_none_to_share(plan: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    plan["teacher"] = {**plan["student"]}
    plan["teacher"].pop("frameworks")
    with pytest.raises(UsageError, match="give the teacher an encoder or a model"):
        run_recipe(DistillRecipe.model_validate(plan), tmp_path / "out", device="cpu")


def test_it_is_exported_and_its_layers_multiply_in_integers(plan: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from calib.distill.quantized.deployment import deploy
    from calib.distill.quantized.latency import first_input, measure_latency
    from calib.distill.task import ClassificationTask

    torch.manual_seed(0)
    model = make_text_network("text_micro_clipped", 2, vocabulary=50, length=16).eval()
    ids = torch.randint(50, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    scales = deploy(model, ClassificationTask(), [batch], [batch]).scales
    latency = measure_latency(model, scales, first_input(batch), pairs=2)
    assert latency.layers == 2 * 6 + 1
    assert latency.integer_layers == 2 * 6  # the head reads one row per text, which the exporter leaves in float
