# SPDX-License-Identifier: Apache-2.0
"""What `calib distill run` refuses, each in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calib.distill.classifier import classifier_of
from calib.distill.folders import open_classifier
from calib.distill.run import run_recipe
from calib.errors import CalibError, CorpusError, UsageError
from calib.models import open_model
from calib.schema.distill import DistillRecipe


def recipe(source: Path, **changes: Any) -> DistillRecipe:
    training = {"epochs": 1, "batch_size": 4}
    plan = {
        "metadata": {"title": "t", "description": "d"},
        "task": "image-classification",
        "data": {"source": str(source), "image": {"size": 1, "channels": 4}},
        "teacher": {"network": "mlp16", "training": training},
        "mcmi": {"epochs": 1},
        "student": {"network": "mlp16", "training": training, "frameworks": [{"name": "kd"}]},
    }
    return DistillRecipe.model_validate(plan | changes)


def vectors(folder: Path, labels: list[int], test: list[int] | None = None) -> Path:
    for split, found in (("train", labels), ("test", test or labels)):
        save_file(
            {"inputs": torch.randn(len(found), 4), "labels": torch.tensor(found)}, folder / f"{split}.safetensors"
        )
    return folder


@pytest.mark.parametrize(
    ("labels", "test", "words"),
    [
        ([0] * 8, None, "one class only"),
        ([0, 2] * 8, None, "0 training samples of class 1"),
        ([0, 1] * 8 + [2], None, "1 training samples of class 2"),
        ([0, 1] * 8, [0, 1, 2], "classes that the training data lack"),
        ([0, -1] * 8, None, "labels -1..0"),
    ],
    ids=["one class", "absent", "alone", "unknown in test", "out of range"],
)
def test_labels_that_do_not_make_a_problem_are_refused(
    tmp_path: Path, labels: list[int], test: list[int] | None, words: str
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CalibError, match=words):
        run_recipe(recipe(vectors(tmp_path, labels, test)), tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("strength", [-0.1, 0.0, 1.0])
def test_a_lambda_outside_its_range_is_refused(tmp_path: Path, strength: float) -> None:
    from calib.distill.mcmi import check_strength

    with pytest.raises(ValueError, match="between 0 and 1"):
        recipe(tmp_path, mcmi={"strengths": [strength]})
    if strength:
        with pytest.raises(UsageError):
            check_strength(strength)


def test_a_regression_head_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(tiny_bert, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "regression")
    for file in tiny_bert.glob("token*"):
        (tmp_path / "regression" / file.name).write_bytes(file.read_bytes())
    opened = open_model(tmp_path / "regression", task="text-classification", device="cpu")
    with pytest.raises(UsageError, match="regression"):
        classifier_of(opened, "regression")


def test_another_vocabulary_and_other_images_are_refused(minilm_like: Path, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": word, "label": word} for word in ("whale", "scale") * 8]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "out").mkdir()
    training = {"epochs": 1, "batch_size": 4}
    plan = recipe(
        tmp_path,
        task="text-classification",
        data={"source": str(tmp_path), "max_length": 8},
        teacher={"encoder": str(minilm_like), "training": training},
        student={"encoder": str(tiny_bert), "training": training, "frameworks": [{"name": "kd"}]},
    )
    from calib.distill.rehearsal import check_inputs

    teacher, student = (open_encoder(folder) for folder in (minilm_like, tiny_bert))
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        with pytest.raises(UsageError, match="other vocabularies"):
            run_recipe(plan, tmp_path / "out", device="cpu")
    student.tokenizer.add_tokens(["a-new-token"])
    with pytest.raises(UsageError, match="other vocabularies"):
        check_inputs(student, teacher)


def open_encoder(folder: Path) -> Any:
    from calib.distill.classifier import Classifier
    from calib.distill.task import ClassificationTask

    found = open_model(folder, task="feature-extraction", device="cpu")
    return Classifier(found.model, "text", 2, folder.name, ClassificationTask(), tokenizer=found.tokenizer)


def test_data_of_other_classes_than_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """The class names of a checkpoint must be those of the data, or have nothing in common with them."""
    from calib.distill.data import read_records

    found = read_records(str(vectors(tmp_path, [0, 1] * 4)), "train")
    with pytest.raises(CorpusError, match="unknown to model"):
        found.renamed({"0": 0, "other": 1})
    with pytest.raises(CalibError):
        open_classifier(str(tmp_path / "nothing"), device="cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"network": "mlp17", "frameworks": [{"name": "kd"}]}}, "network 'mlp17': unknown"),
        ({"student": {"network": "mlp16", "frameworks": [{"name": "kdd"}]}}, "framework 'kdd': unknown"),
        ({"student": {"network": "mlp16", "frameworks": [{"name": "vid"}]}}, "framework vid: needs feature maps"),
        ({"student": {"network": "resnet8", "frameworks": [{"name": "kd"}]}}, "ResNet: cannot read a batch"),
        ({"protocol": {"kind": "zero-shot", "omitted": [["zebra"]]}}, "omitted class zebra: unknown"),
    ],
    ids=["network", "framework", "maps", "images", "omitted"],
)
def test_what_cannot_be_is_refused_before_the_teacher_is_trained(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    lines: list[str] = []
    (tmp_path / "out").mkdir()
    plan = recipe(vectors(tmp_path, [0, 1] * 8), **changes)
    with pytest.raises(CalibError, match=said):
        run_recipe(plan, tmp_path / "out", device="cpu", progress=lines.append)
    assert lines == []


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="device cuda:99"):
        run_recipe(recipe(vectors(tmp_path, [0, 1] * 8)), tmp_path / "out", device="cuda:99")


def test_a_split_that_is_not_there_is_told_from_those_that_are(tmp_path: Path) -> None:
    from calib.distill.data import read_records

    with pytest.raises(CorpusError, match="no split dev; there is test, train"):
        read_records(str(vectors(tmp_path, [0, 1])), "dev")
