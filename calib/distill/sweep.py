# SPDX-License-Identifier: Apache-2.0
"""Chooses lambda on a validation split. Test data has no place here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from calib.distill.information import InformationSummary
from calib.distill.teacher import TeacherRun, TeacherSettings, fine_tune
from calib.errors import UsageError

__all__ = ["SweepPoint", "SweepResult", "sweep_strength"]

ACCURACY_TOLERANCE = 0.01


@dataclass(frozen=True)
class SweepPoint:
    """One lambda, its fine-tuning and its score (higher is better); None where it was stopped or lost too much."""

    strength: float
    run: TeacherRun
    score: float | None


@dataclass(frozen=True)
class SweepResult:
    """The chosen teacher, the control with lambda = 0, and every point tried."""

    strength: float
    model: nn.Module
    control_model: nn.Module
    points: list[SweepPoint]

    @property
    def control(self) -> SweepPoint:
        """The point with lambda = 0."""
        return self.points[0]


def sweep_strength(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    strengths: Sequence[float],
    settings: TeacherSettings | None = None,
    *,
    score: Callable[[nn.Module], float] | None = None,
    **options: Any,
) -> SweepResult:
    """Fine-tunes a copy of `model` for lambda = 0 and each of `strengths`, and picks one on `validation`.

    By default the score is log-likelihood + CMI on the validation split, both in nats: CMI is taken as long as it costs
    less than itself. CMI alone is no measure there: the held-out CMI of an over-fitted teacher need not rise with
    lambda, and one that is not over-fitted pays any log-likelihood for it. Teachers whose accuracy is more than one
    point below the control's are left out. A `score` of your own, for example the validation accuracy of a small
    student, replaces all of that. If nothing beats the control, lambda is 0.

    Args:
        model: the trained teacher; unchanged.
        train: loader, see `fine_tune`.
        validation: loader of samples that are in neither the training nor the test data.
        strengths: lambdas to try; 0 is always added.
        settings: all but the strength.
        score: value of a teacher, from validation data only; higher is better.
        options: what else `fine_tune` takes.

    Raises:
        UsageError: no strength above 0.
    """
    settings = settings or TeacherSettings()
    tried = sorted({s for s in strengths if s > 0})
    if not tried:
        raise UsageError("strengths: none above 0; pass for example 0.1 0.25 0.5")
    points: list[SweepPoint] = []
    control_model = chosen = copy.deepcopy(model)
    control = fine_tune(control_model, train, replace(settings, strength=0.0), validation=validation, **options)
    assert control.validation is not None
    floor = control.validation.accuracy - ACCURACY_TOLERANCE
    best = SweepPoint(0.0, control, _worth(control.validation) if score is None else score(control_model))
    points.append(best)
    for strength in tried:
        candidate = copy.deepcopy(model)
        run = fine_tune(candidate, train, replace(settings, strength=strength), validation=validation, **options)
        assert run.validation is not None
        value: float | None = None
        if run.stopped is None and score is not None:
            value = score(candidate)
        elif run.stopped is None and run.validation.accuracy >= floor:
            value = _worth(run.validation)
        points.append(SweepPoint(strength, run, value))
        if value is not None and best.score is not None and value > best.score:
            best, chosen = points[-1], candidate
    return SweepResult(best.strength, chosen, control_model, points)


def _worth(validation: InformationSummary) -> float:
    return validation.log_likelihood + validation.cmi
