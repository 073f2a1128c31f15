# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a trained classifier into an MCMI teacher, beside its control with lambda = 0."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calib.distill.batches import Batches
from calib.distill.centroids import ClassBalancedBatches, MovingCentroids
from calib.distill.checkpoint import Checkpoint
from calib.distill.cmi import measure_information
from calib.distill.distillation import EpochRecord
from calib.distill.grouping import RowGrouping
from calib.distill.guard import CollapseGuard, GuardLimits
from calib.distill.information import ClassInformation, InformationSummary, NonFiniteLogits
from calib.distill.mcmi import check_strength, mcmi_loss
from calib.distill.optimiser import TrainingSettings, make_optimiser
from calib.distill.ranks import Ranks
from calib.distill.task import ClassificationTask, Task
from calib.distill.training_state import loop_state, restore_loop, same_training, time_left
from calib.errors import UsageError
from calib.models.device import input_device
from calib.models.evaluating import evaluating

__all__ = ["McmiResult", "TeacherRun", "TeacherSettings", "fine_tune", "fine_tune_with_control"]

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainingSettings):
    """How a teacher is fine-tuned.

    `strength` is lambda: always 0 or more, and more always raises CMI. `refresh` says when centroids follow the model:
    `epoch` (a full pass after each epoch), `ema` (also a class-balanced mini-batch every `ema_every` steps) or `never`,
    which the authors' code does and which can destroy a teacher; it is here for comparison.
    Defaults of the optimiser: SGD, momentum 0.9, 20 epochs, cosine, as in the authors' code.
    """

    strength: float = 0.25
    epochs: int = 20
    refresh: Literal["epoch", "ema", "never"] = "epoch"
    ema_momentum: float = 0.95
    ema_every: int = 1
    guard: GuardLimits = field(default_factory=GuardLimits)


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
    checkpoints: Path | None = None,
    ranks: Ranks | None = None,
    name: str = "teacher",
    log: Callable[[str, EpochRecord], None] | None = None,
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
        checkpoints: folder to keep the state in, in a file for each lambda. If that file is there, the fine-tuning goes
            on from it, to the result of an unbroken run; a finished one is only read.
        ranks: the processes that share each batch.
        name: of the fine-tuning, to which lambda is added.
        log: called with that name and each finished epoch.

    Raises:
        UsageError: a setting out of range, or an empty loader.
        ArtifactError: the checkpoint is damaged, or of another training.
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
        checkpoint = None
        if checkpoints is not None:
            checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint = Checkpoint(checkpoints / f"lambda-{settings.strength:g}.safetensors")
        ranks = ranks or Ranks(cpu=input_device(model).type == "cpu")
        return _Tuning(model, train, settings, reader, balanced, grouping, checkpoint, ranks).run(
            validation,
            progress or (lambda line: None),
            (lambda record: None) if log is None else partial(log, f"{name}, lambda {settings.strength:g}"),
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
        checkpoint: Checkpoint | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.train, self.settings, self.task = model, train, settings, task
        self.checkpoint, self.ranks, self.identity = checkpoint, ranks, f"mcmi {settings}"
        self.centroids = MovingCentroids(settings.ema_momentum)
        self.batches = Batches(train)
        self.balanced: Iterator[Any] | None = None
        if balanced is not None and settings.refresh == "ema":
            sampler = getattr(balanced, "batch_sampler", None)
            if isinstance(sampler, ClassBalancedBatches):
                sampler.restart()
            self.balanced = Batches(balanced).endless()
        self.epoch, self.done, self.steps, self.moves, self.losses = 0, 0, 0, 0, 0.0
        self.grouping = grouping
        self.row_of_label = None if grouping is None else grouping.row_of_label.to(input_device(model))
        self.held_out_before: InformationSummary | None = None
        self.history: list[InformationSummary] = []
        self.stopped: str | None = None
        self.healthy: dict[str, Tensor] = {}

    def run(
        self, validation: Iterable[Any] | None, progress: Progress, log: Callable[[EpochRecord], None]
    ) -> TeacherRun:
        settings, model = self.settings, self.model
        self.ranks.same_start([model])
        self.optimiser, self.schedule = make_optimiser(model.parameters(), settings.optimiser, settings.epochs)
        held = None if self.checkpoint is None else self.checkpoint.load()
        if held is None:
            self.held_out_before = self._summary(validation)
            information = self._measured(self.train)
            self.history = [information.summary()]
            self._refresh(information)
            self.healthy = _copy(model)
        else:
            self._restore(held)
        guard = CollapseGuard(self.history[0], settings.guard)
        begin, begun = time.perf_counter(), self.epoch
        while self.epoch < settings.epochs and self.stopped is None:
            record = self._epoch(guard)
            if record is not None:
                left = time_left(begin, self.epoch - begun, settings.epochs - begun)
                now = self.history[-1]
                progress(
                    f"lambda {settings.strength} epoch {self.epoch}/{settings.epochs}: CMI {now.cmi:.4f} "
                    f"LL {now.log_likelihood:.4f} accuracy {now.accuracy:.4f}, {left} left"
                )
                log(record)
        if held is None or not held["finished"]:
            self._save(finished=True)
        return TeacherRun(
            strength=settings.strength,
            before=self.history[0],
            after=self.history[-1],
            validation_before=self.held_out_before,
            validation=self._summary(validation),
            epochs=self.history[1:],
            stopped=self.stopped,
        )

    def _epoch(self, guard: CollapseGuard) -> EpochRecord | None:
        """What the epoch came to; None if the guard stopped it."""
        self.model.train()
        for batch in self.batches.epoch(self.done):
            self.stopped = self._step(batch, guard)
            if self.stopped is not None:
                break
            if self.checkpoint is not None and self.checkpoint.due():
                self._save(finished=False)
        if self.stopped is None:
            try:
                information = self._measured(self.train)
                summary = information.summary()
                self.stopped = guard.epoch(summary)
            except NonFiniteLogits:  # left behind by the last step, after its loss was looked at
                self.stopped = "the weights became NaN or infinite; lower the learning rate or lambda"
        self.epoch += 1
        if self.stopped is not None:
            self.model.load_state_dict(self.healthy)
            logger.warning("lambda %s, epoch %d: stopped, %s", self.settings.strength, self.epoch, self.stopped)
            return None
        rate = float(self.optimiser.param_groups[0]["lr"])
        record = EpochRecord(self.epoch, self.steps, self.losses / self.done, rate, cmi=summary.cmi)
        self.history.append(summary)
        self.healthy = _copy(self.model)
        if self.settings.refresh != "never":
            self._refresh(information)
        self.schedule.step()
        self.done, self.losses = 0, 0.0
        return record

    def _step(self, batch: Any, guard: CollapseGuard) -> str | None:
        """One step; returns the reason to stop, if there is one."""
        decisions = self.task.decide(self.model, self.ranks.share(batch))
        terms = mcmi_loss(
            decisions.logits,
            decisions.labels,
            self.centroids.rows,
            self.settings.strength,
            row_of_label=self.row_of_label,
        )
        loss = float(terms.loss.detach())
        reason = guard.step(loss, float(terms.divergence.detach()))
        if reason is not None:
            return reason
        self.optimiser.zero_grad()
        terms.loss.backward()
        self.ranks.average_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimiser.step()
        self.done += 1
        self.steps += 1
        self.losses += loss
        if self.balanced is not None and self.steps % self.settings.ema_every == 0:
            self.moves += 1
            with torch.no_grad(), evaluating(self.model):
                decisions = self.task.decide(self.model, next(self.balanced))
            self.centroids.move(decisions.logits, decisions.labels)
        return None

    def _save(self, *, finished: bool) -> None:
        if self.checkpoint is None or not self.ranks.main:
            return
        before = self.held_out_before
        state: dict[str, Any] = {
            "identity": self.identity,
            "finished": finished,
            "model": self.model.state_dict(),
            "history": [summary.to_dict() for summary in self.history],
            "held_out_before": None if before is None else before.to_dict(),
            "stopped": self.stopped,
        }
        if not finished:
            state |= {
                "epoch": self.epoch,
                "done": self.done,
                "steps": self.steps,
                "moves": self.moves,
                "losses": self.losses,
                "healthy": self.healthy,
                "centroids": self.centroids.state(),
                **loop_state(self.optimiser, self.schedule, self.batches),
            }
        self.checkpoint.save(state)

    def _restore(self, held: dict[str, Any]) -> None:
        assert self.checkpoint is not None
        same_training(self.checkpoint.path, held["identity"], self.identity)
        self.model.load_state_dict(held["model"])
        self.history = [InformationSummary(**summary) for summary in held["history"]]
        before = held["held_out_before"]
        self.held_out_before = None if before is None else InformationSummary(**before)
        self.stopped = held["stopped"]
        if held["finished"]:
            self.epoch = self.settings.epochs
            return
        self.epoch, self.done, self.steps, self.moves = (held[key] for key in ("epoch", "done", "steps", "moves"))
        self.losses = held["losses"]
        self.healthy = held["healthy"]
        self.centroids.restore(held["centroids"].to(input_device(self.model)))
        if self.balanced is not None:
            for _ in range(self.moves):
                next(self.balanced)
        restore_loop(held, self.optimiser, self.schedule, self.batches)

    def _refresh(self, information: ClassInformation) -> None:
        self.centroids.set(information, input_device(self.model), self.grouping)

    def _summary(self, loader: Iterable[Any] | None) -> InformationSummary | None:
        return None if loader is None else self._measured(loader).summary()

    def _measured(self, loader: Iterable[Any]) -> ClassInformation:
        rows = None if self.grouping is None else (self.grouping.rows, self.grouping.row_of_label)
        return measure_information(self.model, loader, task=self.task, separation=rows is None, rows=rows)[0]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
