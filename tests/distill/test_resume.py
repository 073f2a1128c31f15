# SPDX-License-Identifier: Apache-2.0
"""A training that is broken off at any step and goes on comes to the result of an unbroken one, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib.distill.centroids import ClassBalancedBatches
from calib.distill.checkpoint import Checkpoint
from calib.distill.distillation import EpochRecord
from calib.distill.networks import make_network
from calib.distill.optimiser import OptimiserSettings
from calib.distill.quantized import FakeQuantization, PeakControl
from calib.distill.student import StudentRun, StudentSettings, train_student
from calib.distill.task import ClassificationTask
from calib.distill.teacher import TeacherSettings, fine_tune
from calib.errors import ArtifactError, ModelError

SETTINGS = StudentSettings(epochs=3, optimiser=OptimiserSettings("adamw", 1e-2, schedule="steps"), auxiliary_epochs=1)
ROUNDED = replace(
    SETTINGS,
    quantization=FakeQuantization(4, 8, weight_step="lsq", start=0.4),
    peaks=PeakControl("peak", 0.1),
)


class Killed(Exception):
    pass


class KilledAt(ClassificationTask):
    """Reads batches, and dies when the student has been asked for the n-th time."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        object.__setattr__(self, "left", calls)

    def decide(self, model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled():
            object.__setattr__(self, "left", self.left - 1)
            if self.left < 0:
                raise Killed
        return super().decide(model, batch)


def fresh() -> nn.Module:
    torch.manual_seed(1)
    return make_network("mlp32", 10, channels=32, size=1)


def student(
    mixture: Any, framework: str, settings: StudentSettings, checkpoint: Checkpoint | None = None, kill: int = 10**9
) -> tuple[nn.Module, StudentRun]:
    model = fresh()
    run = train_student(
        model, mixture.teacher, mixture.loader(), framework, settings, task=KilledAt(kill), checkpoint=checkpoint
    )
    return model, run


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("framework", "settings"),
    [
        ("kd", SETTINGS),
        ("crd", SETTINGS),
        ("pkt", replace(SETTINGS, steps_per_epoch=17, optimiser=OptimiserSettings("sgd", 0.01))),
        ("kd", ROUNDED),
        ("kd", replace(SETTINGS, precision="bfloat16")),
    ],
    ids=["kd", "crd", "repeated", "rounded", "bfloat16"],
)
def test_a_student_goes_on_from_any_step(
    mixture: Any, tmp_path: Path, framework: str, settings: StudentSettings
) -> None:
    whole, run = student(mixture, framework, settings)
    checkpoint = Checkpoint(tmp_path / "student.safetensors", seconds=0.0)
    for kill in (1, 5, 12, 6, 10):  # steps after each start: within an epoch, at its end, in the next
        with pytest.raises(Killed):
            student(mixture, framework, settings, checkpoint, kill)
    broken, again = student(mixture, framework, settings, checkpoint)
    assert equal(whole, broken)
    assert again == run
    if run.plan is not None and again.plan is not None:
        for name, scheme in run.plan.weights.items():
            assert torch.equal(scheme.scale, again.plan.weights[name].scale)  # type: ignore[arg-type, union-attr]


def test_a_finished_student_is_read_and_not_trained_again(mixture: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "student.safetensors")
    whole, run = student(mixture, "kd", ROUNDED, checkpoint)
    read, again = student(mixture, "kd", ROUNDED, checkpoint, kill=0)
    assert equal(whole, read)
    assert again == run
    assert not read.training


def test_a_student_of_images_goes_on_with_its_helpers_and_averages(tmp_path: Path) -> None:
    """Batch normalisation and the classifiers that hsakd trains beside the teacher are part of the state."""
    torch.manual_seed(0)
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 2
    loader = DataLoader(TensorDataset(images, labels, torch.arange(40)), batch_size=8, shuffle=True)
    teacher = make_network("resnet8", 2, channels=1, size=8)

    def trained(checkpoint: Checkpoint | None, kill: int) -> nn.Module:
        torch.manual_seed(1)
        model = make_network("resnet8", 2, channels=1, size=8)
        task = KilledAt(kill)
        train_student(model, teacher, loader, "hsakd", replace(SETTINGS, epochs=2), task=task, checkpoint=checkpoint)
        return model

    checkpoint = Checkpoint(tmp_path / "student.safetensors", seconds=0.0)
    with pytest.raises(Killed):
        trained(checkpoint, 3)
    assert equal(trained(checkpoint, 10**9), trained(None, 10**9))


@pytest.mark.parametrize("refresh", ["epoch", "ema"])
def test_a_fine_tuning_goes_on_from_any_step(
    mixture: Any, tmp_path: Path, refresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    settings = TeacherSettings(
        strength=0.5, epochs=3, refresh=refresh, optimiser=OptimiserSettings("adamw", 1e-3, schedule="cosine")
    )
    sampler = ClassBalancedBatches([int(y) for y in mixture.train.tensors[1]])
    balanced = DataLoader(mixture.train, batch_sampler=sampler) if refresh == "ema" else None

    logs: dict[bool, dict[tuple[str, int], EpochRecord]] = {
        True: {},
        False: {},
    }  # as a log keeps them, whole and broken

    def tuned(folder: Path | None, kill: int) -> tuple[nn.Module, Any]:
        model = mixture.copy()
        loader = mixture.loader("validation", shuffle=False)
        log = logs[folder is None]
        run = fine_tune(
            model,
            mixture.loader(),
            settings,
            task=KilledAt(kill),
            validation=loader,
            balanced=balanced,
            checkpoints=folder,
            log=lambda name, record: log.update({(name, record.epoch): record}),
        )
        return model, run

    whole, run = tuned(None, 10**9)
    for kill in (3, 13, 9):
        with pytest.raises(Killed):
            tuned(tmp_path, kill)
    broken, again = tuned(tmp_path, 10**9)
    assert equal(whole, broken)
    assert again == run
    assert logs[True] == logs[False]
    assert list(logs[True]) == [("teacher, lambda 0.5", epoch) for epoch in (1, 2, 3)]
    read, third = tuned(tmp_path, 0)
    assert equal(whole, read)
    assert third == run


def test_the_checkpoint_of_another_training_and_a_damaged_one_are_refused(mixture: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "student.safetensors")
    student(mixture, "kd", SETTINGS, checkpoint)
    with pytest.raises(ArtifactError, match="another training"):
        student(mixture, "kd", replace(SETTINGS, seed=1), checkpoint)
    with pytest.raises(ArtifactError, match="another training"):
        student(mixture, "pkt", SETTINGS, checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:200])
    with pytest.raises(ArtifactError, match="damaged"):
        student(mixture, "kd", SETTINGS, checkpoint)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(mixture: Any, tmp_path: Path) -> None:
    """From the third epoch on inputs are infinite: weights become NaN."""
    seen = 0

    def transform(batch: Any) -> Any:
        nonlocal seen
        seen += 1
        return (batch[0] * (float("inf") if seen > 2 * 13 else 1.0), *batch[1:])

    checkpoint = Checkpoint(tmp_path / "student.safetensors", seconds=0.0)
    model = fresh()
    with pytest.raises(ModelError, match=r"nan in epoch 3.*last good checkpoint is .*student\.safetensors"):
        train_student(
            model, mixture.teacher, mixture.loader(), "kd", SETTINGS, transform=transform, checkpoint=checkpoint
        )
    held = checkpoint.load()
    assert held is not None
    assert (held["epoch"], held["done"]) == (1, 13)
    assert all(bool(tensor.isfinite().all()) for tensor in held["student"].values())
    assert equal_to(model, held["student"])


def equal_to(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
