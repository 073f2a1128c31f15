# SPDX-License-Identifier: Apache-2.0
"""A language model taught by an MCMI teacher, from a recipe to a student that is a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from calib.corpus import build_blocks
from calib.distill.language import block_loader
from calib.distill.run import run_recipe
from calib.distill.task import CausalLanguageTask
from calib.errors import CorpusError, UsageError
from calib.models import open_model
from calib.scales import load_scales
from calib.schema.distill import DistillRecipe, DistillReport
from tests.cli.commands import run

FAST = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0, "schedule": "constant"}


def plan(model: Path, **changes: Any) -> dict[str, Any]:
    training = {"epochs": 3, "batch_size": 4, "optimiser": FAST}
    given = {
        "metadata": {"title": "t", "description": "d"},
        "task": "text-generation",
        "data": {"source": "builtin:speeches", "max_length": 32, "limit": 40, "validation_share": 0.2},
        "teacher": {"model": str(model)},
        "mcmi": {"strengths": [0.25], "epochs": 1, "batch_size": 4, "optimiser": {**FAST, "learning_rate": 1e-3}},
        "student": {"model": str(model), "layers": 1, "training": training, "frameworks": [{"name": "kd"}]},
    }
    return given | changes


def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, by the command."""
    work = tmp_path_factory.mktemp("language")
    (work / "recipe.yaml").write_text(yaml.safe_dump(plan(tiny_llama)))
    assert run("distill", "run", "-c", work / "recipe.yaml", "-o", work / "out", "--device", "cpu") == 0
    return work / "out"


@pytest.fixture
def report(folder: Path) -> DistillReport:
    return DistillReport.model_validate(json.loads((folder / "report.json").read_text()))


def test_a_student_of_fewer_layers_learns_from_the_teachers_and_is_kept_as_a_checkpoint(
    folder: Path, report: DistillReport
) -> None:
    assert (report.data["train"], report.data["validation"], report.data["test"]) == (24, 8, 8)
    assert [(row.teacher, row.strength) for row in report.teachers] == [("mll", None), ("control", 0), ("mcmi", 0.25)]
    of = {row.teacher: row.train for row in report.teachers}
    assert float(of["mcmi"]["cmi"] or 0) > float(of["control"]["cmi"] or 0) > 0
    assert [(row.framework, row.teacher) for row in report.students] == [
        ("ce", "none"), ("kd", "mll"), ("kd", "control"), ("kd", "mcmi"),
    ]  # fmt: skip
    for row in report.students:
        student = open_model(folder / f"student-0-full-{row.framework}-{row.teacher}-plain", device="cpu")
        assert student.model.config.num_hidden_layers == 1
        assert row.steps == 3 * (24 // 4)
        assert -8 < float(row.log_likelihood or 0) < 0
    teacher = open_model(folder / "teacher-mcmi", device="cpu")
    assert teacher.model.config.num_hidden_layers == 3
    assert (folder / "teacher-mll").is_dir()


def test_what_is_reported_is_what_the_kept_student_does_on_the_held_out_blocks(
    folder: Path, report: DistillReport
) -> None:
    row = report.students[1]
    student = open_model(folder / "student-0-full-kd-mll-plain", device="cpu")
    blocks = build_blocks(["builtin:speeches"], student.tokenizer, samples=40, max_length=32)
    right, nll = [], []
    with torch.no_grad():
        for batch in block_loader(blocks.select(held_out(40)), batch_size=1):
            decisions = CausalLanguageTask().decide(student.model, batch)
            right.append(float((decisions.logits.argmax(-1) == decisions.labels).float().mean()))
            nll.append(float(torch.nn.functional.cross_entropy(decisions.logits, decisions.labels)))
    assert sum(right) / 8 == pytest.approx(row.accuracy, abs=1e-6)
    assert -sum(nll) / 8 == pytest.approx(row.log_likelihood, abs=1e-4)
    assert 0 < row.accuracy < 1


def held_out(blocks: int) -> list[int]:
    """The numbers of the test blocks, as two splits with the seeds of the runner leave them."""
    from calib.distill.data import stratified_share

    validation = set(stratified_share([0] * blocks, 0.2))
    rest = [n for n in range(blocks) if n not in validation]
    return [rest[n] for n in stratified_share([0] * len(rest), len(validation) / len(rest), 1)]


@pytest.mark.slow  # four students are exported to ONNX and timed
def test_a_student_for_quantization_is_deployed_and_kept_with_its_scales(tiny_llama: Path, tmp_path: Path) -> None:
    folder = output(tmp_path)
    given = plan(tiny_llama)
    given["student"]["quantization"] = {"calibration": 8, "plain": False}
    report = run_recipe(DistillRecipe.model_validate(given), folder, device="cpu")
    for row in report.students:
        assert row.deployment is not None
        assert row.deployment.accuracy == pytest.approx(row.accuracy)
        assert {(one.weight_bits, one.scales) for one in row.deployment.quantized} >= {(8, "measured"), (4, "measured")}
    kept = folder / "student-0-full-kd-mcmi-friendly"
    assert load_scales(kept).tensors
    assert open_model(kept, device="cpu").task == "text-generation"


def test_the_card_says_what_a_class_is_and_how_good_the_students_are(folder: Path, report: DistillReport) -> None:
    card = (folder / "README.md").read_text()
    assert "the class of a position is its next token; 24 blocks of 32 tokens" in card
    assert f"{math.exp(-float(report.students[3].log_likelihood or 0)):.2f} |" in card
    assert "1 of its layers" in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"encoder": "x"}}, "teacher and student each need a model"),
        ({"protocol": {"kind": "zero-shot", "omitted": [[1]]}}, "tokens cannot be left out"),
        ({"mcmi": {"refresh": "ema"}}, "nor drawn in balance"),
        ({"student": {"network": "mlp16", "layers": 2, "frameworks": [{"name": "kd"}]}}, "layers belongs to"),
        ({"task": "text-classification"}, "layers belongs to"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str, tiny_llama: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        DistillRecipe.model_validate(plan(tiny_llama, **changes))


def test_too_little_text_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    data = {"source": str(text), "max_length": 64, "limit": 8}
    with pytest.raises(CorpusError, match="no document fills one block of 64 tokens"):
        run_recipe(DistillRecipe.model_validate(plan(tiny_llama, data=data)), output(tmp_path), device="cpu")


def test_more_layers_than_there_are_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    given = plan(tiny_llama)
    given["student"]["layers"] = 9
    with pytest.raises(UsageError, match="layers 9"):
        run_recipe(DistillRecipe.model_validate(given), output(tmp_path), device="cpu")


def test_two_blocks_cannot_train_validate_and_test(tiny_llama: Path, tmp_path: Path) -> None:
    data = {"source": "builtin:speeches", "max_length": 32, "limit": 2}
    with pytest.raises(UsageError, match=r"2 blocks, too few to train, validate and test; raise data\.limit"):
        run_recipe(DistillRecipe.model_validate(plan(tiny_llama, data=data)), output(tmp_path), device="cpu")
