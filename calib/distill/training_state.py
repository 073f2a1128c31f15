# SPDX-License-Identifier: Apache-2.0
"""What belongs to the state of every training beside its model: random generators, identity, time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from calib.distill.batches import Batches
from calib.errors import ArtifactError

__all__ = ["loop_state", "random_state", "restore_loop", "same_training", "set_random_state", "time_left"]

Schedule = torch.optim.lr_scheduler.LRScheduler


def random_state() -> dict[str, Any]:
    """State of torch's global generators, of the CPU and of every GPU."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def loop_state(optimiser: torch.optim.Optimizer, schedule: Schedule, batches: Batches) -> dict[str, Any]:
    """State of what every training loop has, and of the random generators.

    Of a schedule what changes; the rest follows from its settings, and is not always plain data.
    """
    state = schedule.state_dict()
    return {
        "optimiser": optimiser.state_dict(),
        "schedule": {key: state[key] for key in ("last_epoch", "_last_lr", "_step_count")},
        "batches": batches.state(),
        "random": random_state(),
    }


def restore_loop(held: dict[str, Any], optimiser: torch.optim.Optimizer, schedule: Schedule, batches: Batches) -> None:
    """The inverse of `loop_state`; to be called last, for other parts may draw random numbers."""
    optimiser.load_state_dict(held["optimiser"])
    schedule.load_state_dict(held["schedule"])
    batches.restore(held["batches"])
    set_random_state(held["random"])


def same_training(path: Path, held: str, wanted: str) -> None:
    """Refuses to go on with the checkpoint of another training.

    Raises:
        ArtifactError: it is of another.
    """
    if held != wanted:
        raise ArtifactError(f"{path}: is of another training; remove it, or train with the settings that it has")


def time_left(begin: float, done: int, total: int) -> str:
    """Hours, minutes and seconds that the rest takes at the pace so far.

    Args:
        begin: `time.perf_counter()` when the first of `done` began.
        done: steps.
        total: steps.
    """
    seconds = round((time.perf_counter() - begin) / max(1, done) * max(0, total - done))
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60:02} min"
    return f"{minutes} min {seconds % 60:02} s" if minutes else f"{seconds} s"
