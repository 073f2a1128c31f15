# SPDX-License-Identifier: Apache-2.0
"""CMI of a model over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from calib.distill.information import ClassInformation
from calib.distill.task import ClassificationTask, Task
from calib.errors import UsageError
from calib.models.evaluating import evaluating

__all__ = ["measure_information"]


def measure_information(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    task: Task | None = None,
    temperatures: Sequence[float] = (1.0,),
    separation: bool = True,
    rows: tuple[int, torch.Tensor] | None = None,
) -> list[ClassInformation]:
    """One pass of a model over a loader, in evaluation mode; the model comes back as it was.

    Every rank of a distributed run passes its own part of the data and gets the information of all parts. (A
    `DistributedSampler` pads the last batch with repeated samples, which then count twice.)

    Args:
        model: any classifier.
        loader: batches that `task` understands.
        task: how to read them; one label per sample if absent.
        temperatures: one result for each, from the same pass.
        separation: also compute Γ, which doubles the memory.
        rows: number of centroid rows and the row of each label `[C]`, where labels share rows.

    Raises:
        UsageError: the loader is empty, or logits and labels do not fit.
        ModelError: the model cannot read a batch, or answers with NaN or infinity.
    """
    reader: Task = task or ClassificationTask()
    found: list[ClassInformation] = []
    with torch.no_grad(), evaluating(model):
        for batch in loader:
            decisions = reader.decide(model, batch)
            if not found:
                count, row_of_label = rows or (None, None)
                found = [
                    ClassInformation(
                        decisions.logits.shape[1],
                        rows=count,
                        row_of_label=row_of_label,
                        temperature=temperature,
                        separation=separation,
                        device=decisions.logits.device if decisions.logits.is_cuda else "cpu",
                    )
                    for temperature in temperatures
                ]
            for information in found:
                information.update(decisions.logits, decisions.labels)
    if not found:
        raise UsageError("loader: no batch; check the data set and its selection")
    for information in found:
        information.all_reduce()
    return found
