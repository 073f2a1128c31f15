# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a trained classifier into an MCMI teacher, beside its control with lambda = 0."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calib.distill.centroids import MovingCentroids
from calib.distill.cmi import measure_information
from calib.distill.grouping import RowGrouping
from calib.distill.guard import CollapseGuard, GuardLimits
from calib.distill.information import ClassInformation, InformationSummary
from calib.distill.mcmi import check_strength, mcmi_loss
from calib.distill.optimiser import OptimiserSettings, make_optimiser
from calib.distill.task import ClassificationTask, Task
from calib.errors import UsageError
from calib.models.device import input_device
from calib.models.evaluating import evaluating

__all__ = ["McmiResult", "TeacherRun", "TeacherSettings", "fine_tune", "fine_tune_with_control"]

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher is fine-tuned.

    `strength` is lambda: always 0 or more, and more always raises CMI. `refresh` says when centroids follow the model:
    `epoch` (a full pass after each epoch), `ema` (also a class-balanced mini-batch every `ema_every` steps) or `never`,
    which the authors' code does and which can destroy a teacher; it is here for comparison.
    Defaults of the optimiser: SGD, momentum 0.9, 20 epochs, cosine, as in the authors' code.
    """

    strength: float = 0.25
    epochs: int = 20
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    clip_norm: float = 5.0
    refresh: Literal["epoch", "ema", "never"] = "epoch"
    ema_momentum: float = 0.95
    ema_every: int = 1
    guard: GuardLimits = field(default_factory=GuardLimits)
    seed: int = 0


@dataclass(frozen=True)
class TeacherRun:
    """One fine-tuning: what the teacher was and became on training data and, where given, on validation data."""

    strength: float
    before: InformationSummary
    after: InformationSummary
    validation_before: InformationSummary | None
    validation: InformationSummary | None
    epochs: list[InformationSummary]
    stopped: str | None


@dataclass(frozen=True)
class McmiResult:
    """An MCMI teacher (`model`, fine-tuned in place) beside the same fine-tuning with lambda = 0."""

    mcmi: TeacherRun
    control: TeacherRun | None
    control_model: nn.Module | None
    warnings: list[str]


def fine_tune(
    model: nn.Module,
    train: Iterable[Any],
    settings: TeacherSettings | None = None,
    *,
    task: Task | None = None,
    validation: Iterable[Any] | None = None,
    balanced: Iterable[Any] | None = None,
    grouping: RowGrouping | None = None,
    progress: Progress | None = None,
) -> TeacherRun:
    """Fine-tunes `model` in place towards max LL + lambda CMI.

    If the guard stops the run, `stopped` says why and the model has the weights of the last epoch that was healthy.

    Args:
        model: a trained classifier.
        train: loader that can be read again and again; its order is drawn from torch's global generator, which is
            seeded here and put back afterwards, so that two runs with one seed see one order.
        settings: see there.
        task: how to read a batch; one label per sample if absent.
        validation: held-out loader, only reported.
        balanced: loader with `ClassBalancedBatches` for `refresh="ema"`.
        grouping: rows that labels share, for language models.
        progress: called with one line per epoch.

    Raises:
        UsageError: a setting out of range, or an empty loader.
    """
    settings = settings or TeacherSettings()
    reader: Task = task or ClassificationTask()
    check_strength(settings.strength)
    if settings.refresh == "ema" and balanced is None:
        raise UsageError("refresh ema: needs a loader of class-balanced batches; pass balanced= or refresh='epoch'")
    if settings.refresh == "ema" and grouping is not None:
        raise UsageError("refresh ema: follows single classes, not shared rows; use refresh='epoch'")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return _Tuning(model, train, settings, reader, balanced, grouping).run(
            validation, progress or (lambda line: None)
        )


def fine_tune_with_control(
    model: nn.Module,
    train: Iterable[Any],
    settings: TeacherSettings | None = None,
    *,
    control: bool = True,
    **options: Any,
) -> McmiResult:
    """`fine_tune`, and the same from the same start with lambda = 0: fine-tuning alone already changes CMI.

    Args:
        model: a trained classifier; becomes the MCMI teacher.
        train: loader, see `fine_tune`.
        settings: see `TeacherSettings`.
        control: False skips the control.
        options: what else `fine_tune` takes.
    """
    settings = settings or TeacherSettings()
    control_model = copy.deepcopy(model) if control else None
    mcmi = fine_tune(model, train, settings, **options)
    warnings = [] if mcmi.stopped is None else [f"lambda {settings.strength}: stopped, {mcmi.stopped}"]
    if control_model is None:
        return McmiResult(mcmi, None, None, [*warnings, "no control with lambda = 0: a gain cannot be told apart"])
    baseline = fine_tune(control_model, train, replace(settings, strength=0.0), **options)
    if settings.strength > 0 and mcmi.after.cmi <= baseline.after.cmi:
        warnings.append(
            f"CMI {mcmi.after.cmi:.4f} is not above the control's {baseline.after.cmi:.4f}; raise lambda or the epochs"
        )
    if baseline.stopped is not None:
        warnings.append(f"the control was stopped too, {baseline.stopped}")
    return McmiResult(mcmi, baseline, control_model, warnings)


class _Tuning:
    """State of one run."""

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        settings: TeacherSettings,
        task: Task,
        balanced: Iterable[Any] | None,
        grouping: RowGrouping | None,
    ) -> None:
        self.model, self.train, self.settings, self.task = model, train, settings, task
        self.centroids = MovingCentroids(settings.ema_momentum)
        self.balanced = None if balanced is None or settings.refresh != "ema" else _endless(balanced)
        self.steps = 0
        self.grouping = grouping
        self.row_of_label = None if grouping is None else grouping.row_of_label.to(input_device(model))

    def run(self, validation: Iterable[Any] | None, progress: Progress) -> TeacherRun:
        settings, model = self.settings, self.model
        held_out_before = self._summary(validation)
        information = self._pass()
        before = information.summary()
        self._refresh(information)
        guard = CollapseGuard(before, settings.guard)
        optimiser, schedule = make_optimiser(model.parameters(), settings.optimiser, settings.epochs)
        healthy, history, stopped = _copy(model), [before], None
        for epoch in range(settings.epochs):
            stopped = self._epoch(guard, optimiser)
            # a step that went wrong may have left NaN behind, which a pass refuses
            if stopped is None:
                information = self._pass()
                stopped = guard.epoch(information.summary())
            if stopped is not None:
                model.load_state_dict(healthy)
                logger.warning("lambda %s, epoch %d: stopped, %s", settings.strength, epoch + 1, stopped)
                break
            history.append(information.summary())
            healthy = _copy(model)
            if settings.refresh != "never":
                self._refresh(information)
            schedule.step()
            progress(
                f"lambda {settings.strength} epoch {epoch + 1}/{settings.epochs}: CMI {history[-1].cmi:.4f} "
                f"LL {history[-1].log_likelihood:.4f} accuracy {history[-1].accuracy:.4f}"
            )
        return TeacherRun(
            strength=settings.strength,
            before=before,
            after=history[-1],
            validation_before=held_out_before,
            validation=self._summary(validation),
            epochs=history[1:],
            stopped=stopped,
        )

    def _epoch(self, guard: CollapseGuard, optimiser: torch.optim.Optimizer) -> str | None:
        self.model.train()
        for batch in self.train:
            decisions = self.task.decide(self.model, batch)
            terms = mcmi_loss(
                decisions.logits,
                decisions.labels,
                self.centroids.rows,
                self.settings.strength,
                row_of_label=self.row_of_label,
            )
            reason = guard.step(float(terms.loss.detach()), float(terms.divergence.detach()))
            if reason is not None:
                return reason
            optimiser.zero_grad()
            terms.loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
            optimiser.step()
            self.steps += 1
            if self.balanced is not None and self.steps % self.settings.ema_every == 0:
                with torch.no_grad(), evaluating(self.model):
                    decisions = self.task.decide(self.model, next(self.balanced))
                self.centroids.move(decisions.logits, decisions.labels)
        return None

    def _refresh(self, information: ClassInformation) -> None:
        self.centroids.set(information, input_device(self.model), self.grouping)

    def _pass(self) -> ClassInformation:
        return self._measured(self.train)

    def _summary(self, loader: Iterable[Any] | None) -> InformationSummary | None:
        return None if loader is None else self._measured(loader).summary()

    def _measured(self, loader: Iterable[Any]) -> ClassInformation:
        rows = None if self.grouping is None else (self.grouping.rows, self.grouping.row_of_label)
        return measure_information(self.model, loader, task=self.task, separation=rows is None, rows=rows)[0]


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
