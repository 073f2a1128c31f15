# SPDX-License-Identifier: Apache-2.0
"""Trains a student: by a teacher and a framework, or by labels alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from calib.distill.features import FeaturePoints, find_features, look
from calib.distill.frameworks import FRAMEWORKS, Framework, make_framework
from calib.distill.optimiser import OptimiserSettings, make_optimiser
from calib.distill.task import ClassificationTask, Task
from calib.errors import UsageError
from calib.models.evaluating import evaluating

__all__ = ["StudentRun", "StudentSettings", "train_student"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class StudentSettings:
    """How a student is trained.

    `steps_per_epoch` is the number of optimiser steps that counts as an epoch; None is one pass. A few-shot student
    gets that of the full data, so that all students take equally many steps.
    """

    epochs: int = 240
    steps_per_epoch: int | None = None
    optimiser: OptimiserSettings = field(default_factory=lambda: OptimiserSettings(schedule="steps"))
    clip_norm: float = 5.0
    auxiliary_epochs: int = 10
    seed: int = 0


@dataclass(frozen=True)
class StudentRun:
    """What was done: framework, steps, mean loss of the last epoch."""

    framework: str
    steps: int
    loss: float


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
) -> StudentRun:
    """Trains `student` in place; there is no choice of a best epoch, the weights are those of the last step.

    The teacher is evaluated as it is, on the very batch that the student sees (after `transform`); both read one batch.

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

    Raises:
        UsageError: no teacher, an empty loader, or a model without what the framework needs.
    """
    settings, reader = settings or StudentSettings(), task or ClassificationTask()
    if teacher is None and framework != "ce":
        raise UsageError(f"framework {framework}: needs a teacher; pass one, or use ce")
    with torch.random.fork_rng(), nullcontext() if teacher is None else evaluating(teacher):
        torch.manual_seed(settings.seed)
        first = next(iter(train), None)
        if first is None:
            raise UsageError("student: no training batch; check the data and the selection")
        source = teacher or student
        cls = FRAMEWORKS.get(framework)
        wanted = cls is None or cls.needs_maps or cls.needs_embedding
        points = [
            (given or find_features(model, reader, first)) if wanted else None
            for model, given in ((student, student_points), (source, teacher_points))
        ]
        views = []
        with torch.no_grad():
            for model, where in zip((student, source), points, strict=True):
                with evaluating(model):
                    views.append(look(model, reader, first, where))
        count = samples if samples is not None else len(getattr(train, "dataset", ()))
        loss = make_framework(framework, views[0], views[1], count, **(weights or {}))
        loss.to(views[0].logits.device)
        return _Training(student, teacher, loss, reader, settings, points, transform).run(
            train, framework, progress or (lambda line: None)
        )


class _Training:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        framework: Framework,
        task: Task,
        settings: StudentSettings,
        points: list[FeaturePoints | None],
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.student, self.teacher, self.framework, self.task = student, teacher, framework, task
        self.settings, self.points, self.transform = settings, points, transform

    def run(self, train: Iterable[Any], name: str, progress: Progress) -> StudentRun:
        settings, framework = self.settings, self.framework
        framework.fit_teacher(self._teacher_view, train, settings.auxiliary_epochs)
        trained = [*self.student.parameters(), *framework.parameters()]
        optimiser, schedule = make_optimiser(trained, settings.optimiser, settings.epochs)
        batches, steps, mean = _endless(train), 0, math.nan
        for epoch in range(settings.epochs):
            self.student.train()
            framework.train()
            framework.progress = (epoch + 1) / settings.epochs
            one = train if settings.steps_per_epoch is None else itertools.islice(batches, settings.steps_per_epoch)
            losses = []
            for batch in one:
                loss = self._loss(batch)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, settings.clip_norm)
                optimiser.step()
                losses.append(loss.detach())
            steps += len(losses)
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise UsageError(f"student by {name}: the loss became {mean}; lower the learning rate or the weight b")
            schedule.step()
            progress(f"student by {name} epoch {epoch + 1}/{settings.epochs}: loss {mean:.4f}")
        self.student.eval()
        return StudentRun(name, steps, mean)

    def _loss(self, batch: Any) -> torch.Tensor:
        seen = self.framework.prepare(batch if self.transform is None else self.transform(batch))
        mine = look(self.student, self.task, seen, self.points[0])
        theirs = mine if self.teacher is None else self._teacher_view(seen)
        return self.framework(mine, theirs)  # type: ignore[no-any-return]

    def _teacher_view(self, batch: Any) -> Any:
        assert self.teacher is not None
        with torch.no_grad():
            return look(self.teacher, self.task, batch, self.points[1])


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader
