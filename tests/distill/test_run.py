# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from calib.distill.cmi import measure_information
from calib.distill.data import read_records
from calib.distill.folders import open_classifier
from calib.distill.gains import paired_gains
from calib.distill.run import run_recipe
from calib.errors import UsageError
from calib.scales import load_scales
from calib.schema.distill import DistillRecipe, DistillReport, StudentRow

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "distill").glob("*.yaml"))
FAST = {"name": "adamw", "learning_rate": 0.01, "schedule": "constant"}


@pytest.fixture
def source(mixture: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, part in (("train", mixture.train), ("test", mixture.validation)):
        save_file(
            {"inputs": part.tensors[0].clone(), "labels": part.tensors[1].clone()}, folder / f"{split}.safetensors"
        )
    return folder


def recipe(source: Path, **changes: Any) -> DistillRecipe:
    training = {"epochs": 4, "batch_size": 32, "optimiser": FAST}
    plan = {
        "metadata": {"title": "t", "description": "d"},
        "task": "image-classification",
        "data": {"source": str(source), "image": {"size": 1, "channels": 32}},
        "teacher": {"network": "mlp64", "training": training},
        "mcmi": {"strengths": [0.5], "epochs": 2, "optimiser": {**FAST, "learning_rate": 0.001}},
        "student": {"network": "mlp16", "training": training, "frameworks": [{"name": "kd"}]},
        "seeds": [0, 1],
    }
    return DistillRecipe.model_validate(plan | changes)


def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_full_run_reports_teachers_with_their_control_students_and_paired_gains(source: Path, tmp_path: Path) -> None:
    folder = output(tmp_path)
    report = run_recipe(recipe(source, temperatures=[1.0, 4.0]), folder, device="cpu")
    assert report == DistillReport.model_validate(json.loads((folder / "report.json").read_text()))
    assert [(row.seed, row.teacher) for row in report.teachers] == [
        (seed, name) for seed in (0, 1) for name in ("mll", "control", "mcmi")
    ]
    for seed in (0, 1):
        control, mcmi = (r.train["cmi"] for r in report.teachers if r.seed == seed and r.teacher != "mll")
        assert mcmi > control  # type: ignore[operator]
    assert {(r.teacher, r.framework) for r in report.students} == {
        ("none", "ce"),
        ("mll", "kd"),
        ("control", "kd"),
        ("mcmi", "kd"),
    }
    assert all(r.accuracy > 0.2 and r.samples == 720 and r.steps == 4 * 22 for r in report.students)
    assert [(g.against, g.seeds) for g in report.gains] == [("mll", 2), ("control", 2), ("none", 2)]
    kept = open_classifier(str(folder / "teacher-mcmi"), device="cpu")
    loader = kept.loader(kept.dataset(read_records(str(source), "test")))
    found = measure_information(kept.model, loader)[0].summary()
    assert found.accuracy == report.teachers[2].test["accuracy"]


def test_few_shot_students_take_as_many_steps_as_with_all_data(source: Path, tmp_path: Path) -> None:
    protocol = {"kind": "few-shot", "shares": [0.05, 0.5]}
    report = run_recipe(recipe(source, protocol=protocol, seeds=[0]), output(tmp_path), device="cpu")
    assert {r.condition: (r.samples, r.samples_per_class) for r in report.students} == {
        "5 %": (40, 4),
        "50 %": (360, 36),
    }
    assert {r.steps for r in report.students} == {4 * 22}


def test_zero_shot_students_are_judged_by_recall_of_what_they_never_saw(source: Path, tmp_path: Path) -> None:
    protocol = {"kind": "zero-shot", "omitted": [[9, 7]]}
    report = run_recipe(recipe(source, protocol=protocol, seeds=[0]), output(tmp_path), device="cpu")
    alone = next(r for r in report.students if r.teacher == "none")
    assert alone.condition == "without 7, 9"
    assert alone.omitted_recall == 0.0
    assert alone.kept_accuracy is not None
    assert alone.confusion is not None
    assert torch.tensor(alone.confusion).sum() == 400
    assert torch.tensor(alone.confusion)[:, [7, 9]].sum() == 0


def test_several_strengths_are_swept_and_the_ema_refresh_has_its_balanced_batches(source: Path, tmp_path: Path) -> None:
    mcmi = {"strengths": [0.25, 0.5], "epochs": 1, "refresh": "ema", "optimiser": {**FAST, "learning_rate": 0.001}}
    report = run_recipe(recipe(source, mcmi=mcmi, seeds=[0]), output(tmp_path), device="cpu")
    assert report.teachers[2].strength in (0.0, 0.25, 0.5)
    assert report.teachers[1].strength == 0.0


def test_images_are_augmented_and_their_maps_drawn(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    torch.manual_seed(0)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        images = torch.randint(256, (30, 1, 16, 16), dtype=torch.uint8)
        save_file({"inputs": images, "labels": torch.arange(30) % 3}, data / f"{split}.safetensors")
    training = {"epochs": 1, "batch_size": 8, "augment": True, "optimiser": FAST}
    plan = recipe(
        data,
        data={"source": str(data), "image": {"size": 16, "channels": 1}},
        teacher={"network": "resnet14", "training": training},
        student={"network": "resnet8", "training": training, "frameworks": [{"name": "at"}]},
        seeds=[0],
    )
    folder = output(tmp_path)
    report = run_recipe(plan, folder, device="cpu")
    assert report.covered_area is not None
    assert set(report.covered_area) == {"mll", "control", "mcmi"}
    assert (folder / "eigen_cam.png").stat().st_size > 0


def test_a_text_encoder_teaches_its_first_layer(minilm_like: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"text": t, "label": y} for t, y in [("the whale swam", "whale"), ("the scale and the error", "scale")] * 10
    ]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    training = {"epochs": 3, "batch_size": 4, "optimiser": {**FAST, "learning_rate": 0.003}}
    plan = recipe(
        data,
        task="text-classification",
        data={"source": str(data), "max_length": 16},
        teacher={"encoder": str(minilm_like), "training": training},
        student={"encoder": str(minilm_like), "layers": 1, "training": training, "frameworks": [{"name": "at"}]},
        seeds=[0],
    )
    report = run_recipe(plan, output(tmp_path), device="cpu")
    assert all(row.accuracy > 0.9 for row in report.students)
    assert report.covered_area is None


def test_students_for_quantization_are_deployed_and_timed_beside_their_teacher(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    training = {"epochs": 2, "batch_size": 32, "optimiser": FAST}
    student = {
        "network": "mlp16",
        "training": training,
        "frameworks": [{"name": "kd"}],
        "quantization": {"calibration": 64, "peaks": {"term": "peak_to_mean"}},
    }
    folder = output(tmp_path)
    report = run_recipe(recipe(source, student=student, seeds=[0]), folder, device="cpu")
    assert [(row.framework, row.variant) for row in report.students][:2] == [("ce", "plain"), ("ce", "friendly")]
    for row in report.students:
        assert row.deployment is not None
        assert row.deployment.accuracy == pytest.approx(row.accuracy)
        learned = {one.scales for one in row.deployment.quantized}
        assert learned == ({"measured", "learned"} if row.variant == "friendly" else {"measured"})
        latency = row.deployment.latency
        assert latency is not None
        assert (latency.integer_layers, latency.layers) == (3, 3)
        assert (latency.teacher_ms is None) == (row.teacher == "none")
        kept = folder / f"student-0-full-{row.framework}-{row.teacher}-{row.variant}"
        assert load_scales(kept).tensors
        assert open_classifier(str(kept), device="cpu").classes == 10


def test_a_trained_checkpoint_plugs_in_as_teacher(source: Path, tmp_path: Path) -> None:
    folder = output(tmp_path)
    run_recipe(recipe(source, seeds=[0]), folder, device="cpu")
    second = tmp_path / "second"
    second.mkdir()
    plan = recipe(source, seeds=[0], teacher={"model": str(folder / "teacher-mll")})
    report = run_recipe(plan, second, device="cpu")
    first = json.loads((folder / "report.json").read_text())
    assert report.teachers[0].test == first["teachers"][0]["test"]
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for split in ("train", "test"):
        save_file({"inputs": torch.randn(40, 32), "labels": torch.arange(40) % 4}, wrong / f"{split}.safetensors")
    with pytest.raises(UsageError, match="10 outputs for 4 classes"):
        run_recipe(recipe(wrong, seeds=[0], teacher={"model": str(folder / "teacher-mll")}), second, device="cpu")


def row(seed: int, teacher: str, accuracy: float) -> StudentRow:
    return StudentRow.model_validate(
        {
            "seed": seed,
            "teacher": teacher,
            "framework": "ce" if teacher == "none" else "kd",
            "condition": "full",
            "samples": 1,
            "samples_per_class": 1,
            "steps": 1,
            "accuracy": accuracy,
        }
    )


def test_gains_are_paired_by_seed() -> None:
    rows = [row(0, "mcmi", 0.5), row(1, "mcmi", 0.7), row(2, "mcmi", 0.6)]
    rows += [row(0, "mll", 0.4), row(1, "mll", 0.7), row(2, "mll", 0.4), row(0, "none", 0.1)]
    mll, none = paired_gains(rows)
    assert mll.mean == pytest.approx(0.1)
    assert mll.standard_error == pytest.approx(0.1 / 3**0.5)
    assert (mll.wins, mll.seeds) == (2, 3)
    assert (none.against, none.seeds, none.standard_error) == ("none", 1, None)
    assert none.mean == pytest.approx(0.4)


def test_models_that_do_not_fit_the_task_are_refused(source: Path, tmp_path: Path, tiny_bert: Path) -> None:
    folder = output(tmp_path)
    with pytest.raises(UsageError, match="is for texts"):
        run_recipe(recipe(source, teacher={"encoder": str(tiny_bert)}), folder, device="cpu")
    with pytest.raises(UsageError, match="is for images"):
        run_recipe(recipe(source, task="text-classification"), folder, device="cpu")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_follow_the_schema(path: Path) -> None:
    found = DistillRecipe.model_validate(yaml.safe_load(path.read_text()))
    assert found.mcmi.control
    assert len(found.seeds) >= 3
