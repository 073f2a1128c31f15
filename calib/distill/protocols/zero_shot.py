# SPDX-License-Identifier: Apache-2.0
"""Zero-shot: classes that the student never sees, neither image nor label; only the teacher's outputs speak of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.data import Records
from calib.distill.task import ClassificationTask, Task
from calib.errors import UsageError
from calib.models.evaluating import evaluating

__all__ = ["ZeroShotResult", "confusion_matrix", "without_classes", "zero_shot_result"]


@dataclass(frozen=True)
class ZeroShotResult:
    """Confusion matrix over all classes (rows: truth), recall of the omitted classes, accuracy on the kept ones.

    Both shares are over samples, and predictions range over all classes.
    """

    omitted: tuple[int, ...]
    confusion: Tensor
    omitted_recall: float
    kept_accuracy: float


def without_classes(records: Records, omitted: Sequence[int | str]) -> tuple[Records, tuple[int, ...]]:
    """The samples of all other classes, and the numbers of the omitted ones. The student keeps its outputs for all.

    Args:
        records: training data.
        omitted: class names or numbers.

    Raises:
        UsageError: an unknown class, or none or all of them.
    """
    names = {name: number for number, name in enumerate(records.class_names)}
    numbers: list[int] = []
    for one in omitted:
        number = names.get(str(one), one if isinstance(one, int) else -1)
        if not 0 <= number < len(records.class_names):
            raise UsageError(f"omitted class {one}: unknown; the classes are {', '.join(records.class_names[:20])}")
        numbers.append(number)
    kept = [n for n, label in enumerate(records.labels) if label not in numbers]
    if not numbers or not kept:
        raise UsageError(f"omitted classes {list(omitted)}: must be some, but not all, of the classes")
    return records.select(kept), tuple(sorted(set(numbers)))


@torch.no_grad()
def confusion_matrix(model: nn.Module, loader: Iterable[Any], task: Task | None = None) -> Tensor:
    """Counts int64 `[C, C]`: rows are true classes, columns predictions; in evaluation mode.

    Raises:
        UsageError: the loader is empty.
    """
    reader: Task = task or ClassificationTask()
    counts: Tensor | None = None
    with evaluating(model):
        for batch in loader:
            decisions = reader.decide(model, batch)
            classes = decisions.logits.shape[1]
            pairs = decisions.labels * classes + decisions.logits.argmax(dim=1)
            found = torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
            counts = found if counts is None else counts + found
    if counts is None:
        raise UsageError("loader: no batch; check the test data")
    return counts


def zero_shot_result(
    model: nn.Module, loader: Iterable[Any], omitted: Sequence[int], task: Task | None = None
) -> ZeroShotResult:
    """Evaluates a student on test data of all classes.

    Args:
        model: the student.
        loader: test data.
        omitted: numbers of the classes that it never saw.
        task: how to read a batch.
    """
    counts = confusion_matrix(model, loader, task)
    unseen = torch.zeros(len(counts), dtype=torch.bool)
    unseen[list(omitted)] = True
    right, total = counts.diagonal(), counts.sum(dim=1)
    return ZeroShotResult(
        omitted=tuple(omitted),
        confusion=counts,
        omitted_recall=float(right[unseen].sum() / total[unseen].sum().clamp(min=1)),
        kept_accuracy=float(right[~unseen].sum() / total[~unseen].sum().clamp(min=1)),
    )
