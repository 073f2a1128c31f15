# SPDX-License-Identifier: Apache-2.0
"""Optimiser and learning rate schedule, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from calib.errors import UsageError

__all__ = ["OptimiserSettings", "TrainingSettings", "make_optimiser"]


@dataclass(frozen=True)
class OptimiserSettings:
    """SGD with momentum, or AdamW; constant rate, cosine to 0, or division by 10 at 5/8, 6/8 and 7/8 of the run."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    schedule: Literal["cosine", "steps", "constant"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training has."""

    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    clip_norm: float = 5.0
    seed: int = 0


def make_optimiser(
    parameters: Iterable[nn.Parameter],
    settings: OptimiserSettings,
    epochs: int,
    undecayed: Iterable[nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """An optimiser over the parameters that want gradients, and a schedule to be stepped `epochs` times.

    Args:
        parameters: to train.
        settings: optimiser and schedule.
        epochs: steps of the schedule.
        undecayed: more of them, without weight decay.

    Raises:
        UsageError: a learning rate or a number of steps that is not positive.
    """
    if settings.learning_rate <= 0 or epochs < 1:
        raise UsageError(f"learning rate {settings.learning_rate}, {epochs} epochs: both must be positive")
    trained: list[dict[str, Any]] = [{"params": [p for p in parameters if p.requires_grad]}]
    if apart := list(undecayed):
        trained.append({"params": apart, "weight_decay": 0.0})
    optimiser: torch.optim.Optimizer
    if settings.name == "sgd":
        optimiser = torch.optim.SGD(
            trained, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    else:
        optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedules = torch.optim.lr_scheduler
    schedule: torch.optim.lr_scheduler.LRScheduler
    if settings.schedule == "cosine":
        schedule = schedules.CosineAnnealingLR(optimiser, epochs)
    elif settings.schedule == "steps":
        schedule = schedules.MultiStepLR(optimiser, [epochs * k // 8 for k in (5, 6, 7)], gamma=0.1)
    else:
        schedule = schedules.ConstantLR(optimiser, factor=1.0)
    return optimiser, schedule
