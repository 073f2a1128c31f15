# SPDX-License-Identifier: Apache-2.0
"""The MCMI objective inside `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from calib.distill.centroids import MovingCentroids
from calib.distill.cmi import measure_information
from calib.distill.guard import CollapseGuard, GuardLimits
from calib.distill.information import InformationSummary, NonFiniteLogits
from calib.distill.mcmi import check_strength, mcmi_loss
from calib.distill.task import ClassificationTask, Task
from calib.models.device import input_device

__all__ = ["CentroidRefresh", "McmiTrainer"]


class McmiTrainer(Trainer):
    """`Trainer` that maximises log-likelihood + lambda CMI of a sequence or image classifier.

    Centroids come from a full pass over the training data before the first and after each epoch, summed over ranks. The
    guard ends the training if the teacher collapses; `stopped` then says why. `history` has one summary per pass.

    Args:
        args: what `Trainer` takes, by position or name.
        strength: lambda, 0 <= lambda < 1; 0 is the control.
        guard: limits of the guard.
        options: what `Trainer` takes.
    """

    def __init__(self, *args: Any, strength: float = 0.25, guard: GuardLimits | None = None, **options: Any) -> None:
        self.strength = check_strength(strength)
        self.centroids = MovingCentroids()
        self.task: Task = ClassificationTask()
        self.refresh = CentroidRefresh(self, guard)
        super().__init__(*args, **options)
        # compute_loss returns the mean of a micro-batch, so Trainer must divide by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self.add_callback(self.refresh)

    @property
    def stopped(self) -> str | None:
        """Why the guard ended the training, or None."""
        return self.refresh.stopped

    @property
    def history(self) -> list[InformationSummary]:
        """Information over the training data, before the first and after each epoch."""
        return self.refresh.history

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """CE - lambda D(P‖Q) of a batch; see `mcmi_loss`."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if not self.refresh.history:  # evaluation before training: there are no centroids yet
            loss = nn.functional.cross_entropy(outputs.logits.float(), labels)
        else:
            loss = mcmi_loss(outputs.logits, labels, self.centroids.rows, self.strength).loss
        return (loss, outputs) if return_outputs else loss


class CentroidRefresh(TrainerCallback):
    """Measures the training data between epochs, hands the centroids to the trainer, and stops a collapse."""

    def __init__(self, trainer: McmiTrainer, limits: GuardLimits | None = None) -> None:
        self.trainer = trainer
        self.limits = limits
        self.guard: CollapseGuard | None = None
        self.history: list[InformationSummary] = []
        self.stopped: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """First centroids."""
        self.guard, self.history, self.stopped = None, [], None
        self._refresh(options["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Fresh centroids for the next epoch, or the end."""
        self.stopped = self._refresh(options["model"])
        if self.stopped is not None:
            control.should_training_stop = True

    def _refresh(self, model: nn.Module) -> str | None:
        loader = self.trainer.get_eval_dataloader(self.trainer.train_dataset)
        try:
            information = measure_information(model, loader, task=self.trainer.task)[0]
        except NonFiniteLogits:
            if self.guard is None:
                raise
            return "the weights became NaN or infinite; lower the learning rate or lambda"
        summary = information.summary()
        self.history.append(summary)
        self.trainer.centroids.set(information, input_device(model))
        if self.guard is None:
            self.guard = CollapseGuard(summary, self.limits)
            return None
        return self.guard.epoch(summary)
