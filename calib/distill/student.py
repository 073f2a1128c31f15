# SPDX-License-Identifier: Apache-2.0
"""Trains a student: by a teacher and a framework, or by labels alone; in float or for quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from calib.distill.checkpoint import Checkpoint
from calib.distill.distillation import Distillation, EpochRecord, Sides
from calib.distill.features import FeaturePoints, find_features, look
from calib.distill.frameworks import FRAMEWORKS, make_framework
from calib.distill.optimiser import OptimiserSettings, TrainingSettings
from calib.distill.quantized import FakeQuantization, PeakControl, PeakTerm, QuantizationAware
from calib.distill.ranks import Ranks
from calib.distill.task import ClassificationTask, Task
from calib.errors import UsageError
from calib.models.evaluating import evaluating
from calib.quantized import QuantizationPlan

__all__ = ["StudentRun", "StudentSettings", "fitted_sides", "train_student"]

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StudentSettings(TrainingSettings):
    """How a student is trained.

    `steps_per_epoch` is the number of optimiser steps that counts as an epoch; None is one pass. A few-shot student
    gets that of the full data, so that all students take equally many steps. `precision` is that of products in the
    forward pass (autocast); weights, gradients' sums and the loss stay in float32.
    """

    epochs: int = 240
    steps_per_epoch: int | None = None
    optimiser: OptimiserSettings = field(default_factory=lambda: OptimiserSettings(schedule="steps"))
    auxiliary_epochs: int = 10
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: FakeQuantization | None = None
    peaks: PeakControl | None = None


@dataclass(frozen=True)
class StudentRun:
    """What was done: framework, steps, mean loss of the last epoch, epochs; and the plan that was trained for."""

    framework: str
    steps: int
    loss: float
    history: tuple[EpochRecord, ...] = ()
    plan: QuantizationPlan | None = field(default=None, compare=False)


def train_student(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Iterable[Any],
    framework: str = "kd",
    settings: StudentSettings | None = None,
    *,
    task: Task | None = None,
    samples: int | None = None,
    weights: dict[str, float | None] | None = None,
    student_points: FeaturePoints | None = None,
    teacher_points: FeaturePoints | None = None,
    transform: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks | None = None,
    name: str | None = None,
    log: Callable[[str, EpochRecord], None] | None = None,
) -> StudentRun:
    """Trains `student` in place; there is no choice of a best epoch, the weights are those of the last step.

    The teacher is evaluated as it is, on the very batch that the student sees (after `transform`); both read one batch.
    The student is left in float; `StudentRun.plan` quantizes it as it was trained.

    Args:
        student: network with fresh or trained weights.
        teacher: classifier with as many classes; None only for the framework `ce`.
        train: loader that can be read again and again, shuffled by torch's global generator.
        framework: one of `FRAMEWORKS`.
        settings: see there.
        task: how to read a batch.
        samples: size of the data set; the largest sample number is below it. Taken from the loader if absent.
        weights: r, a, b and T where they differ from the framework's own, see `make_framework`.
        student_points: where the student's features are; found if absent.
        teacher_points: where the teacher's features are; found if absent.
        transform: augmentation of a batch.
        progress: called with one line per epoch.
        checkpoint: where to keep the state. If it holds one, the training goes on from there, to the result of an
            unbroken run; a finished one is only read.
        ranks: the processes that share each batch.
        name: of the training, in lines and logs.
        log: called with the name and the record of each epoch.

    Raises:
        UsageError: no teacher, an empty loader, or a model without what the framework needs.
        ModelError: a model cannot read a batch, or the loss is not finite; the student then has the weights of the last
            epoch that was healthy.
        ArtifactError: the checkpoint is damaged, or of another training.
    """
    settings, reader = settings or StudentSettings(), task or ClassificationTask()
    if teacher is None and framework != "ce":
        raise UsageError(f"framework {framework}: needs a teacher; pass one, or use ce")
    with torch.random.fork_rng(), nullcontext() if teacher is None else evaluating(teacher):
        torch.manual_seed(settings.seed)
        first = next(iter(train), None)
        if first is None:
            raise UsageError("student: no training batch; check the data and the selection")
        count = samples if samples is not None else len(getattr(train, "dataset", ()))
        sides = fitted_sides(
            student, teacher, first, framework, reader, count, weights, student_points, teacher_points, transform
        )
        aware = None
        if settings.quantization is not None:

            def once() -> None:
                with torch.no_grad(), evaluating(student):
                    reader.decide(student, first)

            aware = QuantizationAware(student, settings.quantization, once)
        distillation = Distillation(
            sides,
            train,
            settings,
            aware=aware,
            peaks=None if settings.peaks is None else PeakTerm(student, settings.peaks),
            ranks=ranks or Ranks(cpu=next(student.parameters()).device.type == "cpu"),
            checkpoint=checkpoint,
            name=name or f"student by {framework}",
            framework=framework,
        )
        history = distillation.run(progress or (lambda line: None), log or (lambda name, record: None))
        plan = None if aware is None else aware.learned_plan()
        return StudentRun(framework, history[-1].steps, history[-1].loss, tuple(history), plan)


def fitted_sides(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Any,
    framework: str,
    task: Task,
    samples: int,
    weights: dict[str, float | None] | None = None,
    student_points: FeaturePoints | None = None,
    teacher_points: FeaturePoints | None = None,
    transform: Callable[[Any], Any] | None = None,
) -> Sides:
    """Student, teacher and a framework made for their shapes, which one batch tells; see `train_student`.

    Raises:
        UsageError: an unknown framework, or a model without what it needs.
        ModelError: a model cannot read the batch.
    """
    source = teacher or student
    cls = FRAMEWORKS.get(framework)
    wanted = cls is None or cls.needs_maps or cls.needs_embedding
    points = [
        (given or find_features(model, task, batch)) if wanted else None
        for model, given in ((student, student_points), (source, teacher_points))
    ]
    views = []
    with torch.no_grad():
        for model, where in zip((student, source), points, strict=True):
            with evaluating(model):
                views.append(look(model, task, batch, where))
    loss = make_framework(framework, views[0], views[1], samples, **(weights or {}))
    loss.to(views[0].logits.device)
    return Sides(student, teacher, loss, task, points[0], points[1], transform)
