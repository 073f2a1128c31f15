# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from calib.distill.cmi import measure_information
from calib.distill.frameworks import FRAMEWORKS
from calib.distill.networks import make_network
from calib.distill.optimiser import OptimiserSettings
from calib.distill.student import StudentSettings, train_student
from calib.errors import ModelError, UsageError

QUICK = StudentSettings(epochs=6, optimiser=OptimiserSettings("adamw", 1e-2, schedule="cosine"), auxiliary_epochs=1)


def fresh() -> torch.nn.Module:
    torch.manual_seed(1)
    return make_network("mlp32", 10, channels=32, size=1)


def accuracy(model: torch.nn.Module, mixture: Any) -> float:
    return measure_information(model, mixture.loader("validation"))[0].summary().accuracy


@pytest.mark.parametrize("name", sorted(set(FRAMEWORKS) - {"at", "vid", "reviewkd", "hsakd"}))
def test_a_student_of_vectors_learns_by_every_framework_that_needs_no_maps(mixture: Any, name: str) -> None:
    student, before = fresh(), {k: v.clone() for k, v in mixture.teacher.state_dict().items()}
    untrained = accuracy(student, mixture)
    run = train_student(student, mixture.teacher, mixture.loader(), name, QUICK)
    assert run.steps == 6 * 13
    assert accuracy(student, mixture) > untrained + 0.2
    assert not student.training
    assert all(torch.equal(before[k], v) for k, v in mixture.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in mixture.teacher.parameters())


@pytest.mark.parametrize("name", ["at", "vid", "reviewkd", "hsakd", "sp", "crd"])
def test_a_student_of_images_learns_from_maps(name: str) -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    images = 0.3 * torch.randn(60, 1, 8, 8)
    for number, label in enumerate(labels.tolist()):
        images[number, 0, 2 * label : 2 * label + 2, :4] += 1.0
    loader = DataLoader(TensorDataset(images, labels, torch.arange(60)), batch_size=20, shuffle=True)
    teacher, student = (make_network(n, 3, channels=1, size=8) for n in ("resnet14", "resnet8"))
    settings = StudentSettings(epochs=16, optimiser=OptimiserSettings("adamw", 3e-3), auxiliary_epochs=1)
    train_student(teacher, None, loader, "ce", settings)
    train_student(student, teacher, loader, name, settings)
    assert measure_information(student, loader)[0].summary().accuracy > 0.8


def test_equal_seeds_give_equal_students(mixture: Any) -> None:
    students = [fresh(), fresh()]
    for student in students:
        train_student(student, mixture.teacher, mixture.loader(), "kd", QUICK)
    for left, right in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_few_samples_are_repeated_for_as_many_steps(mixture: Any) -> None:
    few = DataLoader(Subset(mixture.train, range(40)), batch_size=20, shuffle=True)
    settings = StudentSettings(epochs=2, steps_per_epoch=13, optimiser=QUICK.optimiser)
    assert train_student(fresh(), mixture.teacher, few, "kd", settings).steps == 26


def test_a_transform_is_seen_by_student_and_teacher_alike(mixture: Any) -> None:
    seen = []

    def transform(batch: Any) -> Any:
        seen.append(len(batch[0]))
        return (torch.zeros_like(batch[0]), *batch[1:])

    student = fresh()
    train_student(student, mixture.teacher, mixture.loader(), "kd", QUICK, transform=transform)
    assert sum(seen) == 6 * 800
    assert accuracy(student, mixture) < 0.4  # it never saw a sample as it is


def test_requests_that_cannot_be_met_are_refused(mixture: Any) -> None:
    with pytest.raises(UsageError, match="needs a teacher"):
        train_student(fresh(), None, mixture.loader(), "kd", QUICK)
    with pytest.raises(UsageError, match="no training batch"):
        train_student(fresh(), mixture.teacher, [], "kd", QUICK)
    with pytest.raises(UsageError, match="feature maps"):
        train_student(fresh(), mixture.teacher, mixture.loader(), "at", QUICK)
    wild = StudentSettings(epochs=2, optimiser=OptimiserSettings("sgd", 1e12), clip_norm=1e30)
    with pytest.raises(ModelError, match="the loss became") as error:
        train_student(fresh(), mixture.teacher, mixture.loader(), "kd", wild)
    assert error.value.exit_code == 1
    assert "last good checkpoint" not in str(error.value)  # there is none


def test_a_batch_that_a_model_cannot_read_is_one_line(mixture: Any) -> None:
    with pytest.raises(ModelError, match=r"cannot read a batch \(mat1 and mat2.*; pass what it was made for"):
        train_student(torch.nn.Linear(5, 10), mixture.teacher, mixture.loader(), "kd", QUICK)
