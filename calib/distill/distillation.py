# SPDX-License-Identifier: Apache-2.0
"""`Distillation`: the loop of a student's training, that can be broken off and gone on with at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calib.distill.batches import Batches
from calib.distill.checkpoint import Checkpoint
from calib.distill.features import FeaturePoints, View, look
from calib.distill.frameworks import Framework
from calib.distill.optimiser import make_optimiser
from calib.distill.quantized import PeakTerm, QuantizationAware
from calib.distill.ranks import Ranks
from calib.distill.task import Task
from calib.distill.training_state import loop_state, restore_loop, same_training, time_left
from calib.errors import ModelError
from calib.models.evaluating import evaluating

if TYPE_CHECKING:
    from calib.distill.student import StudentSettings

__all__ = ["Distillation", "EpochRecord", "Sides"]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number from 1, steps so far, mean loss, learning rate.

    `peak_term` is the mean of that term, where there is one; `cmi`, of a teacher that is fine-tuned, is that of the
    training data after the epoch, in nats.
    """

    epoch: int
    steps: int
    loss: float
    learning_rate: float
    peak_term: float | None = None
    cmi: float | None = None


@dataclass(frozen=True)
class Sides:
    """Student and teacher, and how they are compared."""

    student: nn.Module
    teacher: nn.Module | None
    framework: Framework
    task: Task
    student_points: FeaturePoints | None
    teacher_points: FeaturePoints | None
    transform: Callable[[Any], Any] | None

    def views(self, batch: Any) -> tuple[View, View]:
        """What both say about a batch, which they see alike."""
        mine = look(self.student, self.task, batch, self.student_points)
        return mine, mine if self.teacher is None else self.teacher_view(batch)

    def teacher_view(self, batch: Any) -> View:
        """What the teacher says, without gradients."""
        assert self.teacher is not None
        with torch.no_grad():
            return look(self.teacher, self.task, batch, self.teacher_points)

    def prepared(self, batch: Any) -> Any:
        """A batch as both see it."""
        return self.framework.prepare(batch if self.transform is None else self.transform(batch))


class Distillation:
    """State of one training.

    Args:
        sides: student, teacher, framework.
        train: the loader.
        settings: how to train.
        aware: fake quantization of the student, if any.
        peaks: the peak term, if any.
        ranks: processes that share each batch.
        checkpoint: where the state is kept, if anywhere.
        name: of the training, in lines.
        framework: its name, to tell trainings apart.
    """

    def __init__(
        self,
        sides: Sides,
        train: Iterable[Any],
        settings: StudentSettings,
        *,
        aware: QuantizationAware | None,
        peaks: PeakTerm | None,
        ranks: Ranks,
        checkpoint: Checkpoint | None,
        name: str,
        framework: str,
    ) -> None:
        self.sides, self.train, self.settings = sides, train, settings
        self.aware, self.peaks, self.ranks, self.checkpoint = aware, peaks, ranks, checkpoint
        self.name, self.identity = name, f"{framework} {settings}"
        self.device = next(sides.student.parameters()).device
        self.batches = Batches(train, settings.steps_per_epoch)
        self.epoch, self.done, self.steps = 0, 0, 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the loss and of the peak term
        self.history: list[EpochRecord] = []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")

    def run(self, progress: Callable[[str], None], log: Callable[[str, EpochRecord], None]) -> list[EpochRecord]:
        """Trains, or goes on."""
        settings, sides = self.settings, self.sides
        held = None if self.checkpoint is None else self.checkpoint.load()
        if held is None or not held["finished"]:
            epochs = settings.auxiliary_epochs if held is None else 0
            sides.framework.fit_teacher(sides.teacher_view, self.train, epochs)
        steps = [] if self.aware is None else self.aware.undecayed
        clips = [] if self.aware is None else self.aware.decayed
        self.trained = [*sides.student.parameters(), *sides.framework.parameters(), *clips]
        self.optimiser, self.schedule = make_optimiser(self.trained, settings.optimiser, settings.epochs, steps)
        self.trained += steps
        self.ranks.same_start([sides.student, sides.framework])
        # first of all hooks, so that peaks are those of float values, also where rounding goes on
        with self.peaks or nullcontext():
            try:
                if held is not None:
                    self._restore(held)
                healthy, begin, begun = self._weights(), time.perf_counter(), self.steps
                while self.epoch < settings.epochs:
                    self._epoch(healthy)
                    healthy = self._weights()
                    left = time_left(begin, self.steps - begun, self.steps * settings.epochs // self.epoch - begun)
                    record = self.history[-1]
                    progress(
                        f"{self.name} epoch {record.epoch}/{settings.epochs}: loss {record.loss:.4f}"
                        + ("" if record.peak_term is None else f" peak term {record.peak_term:.3g}")
                        + f", {left} left"
                    )
                    log(self.name, record)
            finally:
                if self.aware is not None:
                    self.aware.switch_off()
        sides.student.eval()
        if held is None or not held["finished"]:
            self._save(finished=True)
        return self.history

    def _epoch(self, healthy: dict[str, Tensor]) -> None:
        settings, framework = self.settings, self.sides.framework
        self.sides.student.train()
        framework.train()
        framework.progress = (self.epoch + 1) / settings.epochs
        for batch in self.batches.epoch(self.done):
            self._step(batch)
            if self.checkpoint is not None and self.checkpoint.due() and self._healthy():
                self._save(finished=False)
        if not self._healthy():
            self.sides.student.load_state_dict(healthy)
            there = self.checkpoint is not None and self.checkpoint.path.exists()
            kept = f", the last good checkpoint is {self.checkpoint.path}" if there and self.checkpoint else ""
            raise ModelError(
                f"{self.name}: the loss became {float(self.sums[0])} in epoch {self.epoch + 1}; the weights before it "
                f"are back{kept}; lower the learning rate or the weight b"
            )
        loss, term = (self.sums / self.done).tolist()
        rate = float(self.optimiser.param_groups[0]["lr"])
        self.epoch += 1
        self.history.append(EpochRecord(self.epoch, self.steps, loss, rate, None if self.peaks is None else term))
        self.done = 0
        self.sums.zero_()
        self.schedule.step()

    def _step(self, batch: Any) -> None:
        seen = self.sides.prepared(self.ranks.share(batch))
        self._start_rounding(seen)
        precision: Any = nullcontext()
        if self.settings.precision != "float32":
            precision = torch.autocast(self.device.type, getattr(torch, self.settings.precision))
        if self.peaks is not None:
            self.peaks.watch(seen)
        with precision:
            mine, theirs = self.sides.views(seen)
        loss = self.sides.framework(_in_float32(mine), _in_float32(theirs))
        self.sums[0] += loss.detach()
        if self.peaks is not None:
            term = self.peaks.take()
            self.sums[1] += term.detach()
            # scaled to its share of the loss of this very step: only its direction is the term's own
            loss = loss + self.peaks.control.share * loss.detach() * term / term.detach().clamp(min=1e-12)
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.ranks.average_gradients(self.trained)
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.trained, self.settings.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.aware is not None:
            self.aware.settle()
        self.done += 1
        self.steps += 1

    def _start_rounding(self, batch: Any) -> None:
        aware = self.aware
        if aware is None or aware.active or self.epoch < aware.settings.start * self.settings.epochs:
            return

        def run() -> None:
            with torch.no_grad(), evaluating(self.sides.student):
                self.sides.task.decide(self.sides.student, batch)

        aware.begin(run)
        self.ranks.same_start([aware])

    def _healthy(self) -> bool:
        finite = [self.sums.isfinite().all(), *(p.isfinite().all() for p in self.sides.student.parameters())]
        return bool(torch.stack(finite).all())

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.sides.student.state_dict().items()}

    def _save(self, *, finished: bool) -> None:
        if self.checkpoint is None or not self.ranks.main:
            return
        state = {
            "identity": self.identity,
            "finished": finished,
            "student": self.sides.student.state_dict(),
            "aware": None if self.aware is None else {"active": self.aware.active, **self.aware.state_dict()},
            "history": [asdict(record) for record in self.history],
        }
        if not finished:
            state |= {
                "epoch": self.epoch,
                "done": self.done,
                "steps": self.steps,
                "sums": self.sums,
                "framework": self.sides.framework.state_dict(),
                "scaler": self.scaler.state_dict(),
                **loop_state(self.optimiser, self.schedule, self.batches),
            }
        self.checkpoint.save(state)

    def _restore(self, held: dict[str, Any]) -> None:
        assert self.checkpoint is not None
        same_training(self.checkpoint.path, held["identity"], self.identity)
        self.sides.student.load_state_dict(held["student"])
        self.history = [EpochRecord(**record) for record in held["history"]]
        active = False
        if self.aware is not None:
            active = held["aware"].pop("active")
            self.aware.load_state_dict(held["aware"])
        if held["finished"]:
            self.epoch = self.settings.epochs
            return
        self.epoch, self.done, self.steps = held["epoch"], held["done"], held["steps"]
        self.sums.copy_(held["sums"])
        self.sides.framework.load_state_dict(held["framework"])
        self.scaler.load_state_dict(held["scaler"])
        if self.aware is not None and active:
            self.aware.switch_on()
        restore_loop(held, self.optimiser, self.schedule, self.batches)


def _in_float32(view: View) -> View:
    """Autocast leaves products in half precision; losses are for float32."""
    embedding = None if view.embedding is None else view.embedding.float()
    return View(view.logits.float(), view.labels, tuple(m.float() for m in view.maps), embedding, view.index)
