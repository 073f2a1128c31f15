# SPDX-License-Identifier: Apache-2.0
"""Class centroids that follow a model while it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from calib.distill.grouping import RowGrouping
from calib.distill.information import ClassInformation
from calib.distill.mcmi import floored
from calib.errors import UsageError

__all__ = ["ClassBalancedBatches", "MovingCentroids"]


class MovingCentroids:
    """Rows Q `[C, C]` for `mcmi_loss`: set by a full pass, moved by class-balanced mini-batches.

    A class without samples in the mini-batch keeps its row. With n samples of a class per mini-batch the mean of the
    batch is an unbiased estimate of the row (the CMI *within* such a batch is not: it is low by about 1 - 1/n).
    """

    def __init__(self, momentum: float = 0.95) -> None:
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum {momentum}: not in [0, 1); 0.9 to 0.99 is usual")
        self.momentum = momentum
        self._rows: Tensor | None = None
        self._floored: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """float32 `[C, C]`, every entry positive."""
        assert self._floored is not None, "set() comes first"
        return self._floored

    def set(self, information: ClassInformation, device: torch.device, grouping: RowGrouping | None = None) -> None:
        """Takes the class means of a full pass; of shared rows, leaning on the mean of all."""
        rows = information.centroids() if grouping is None else grouping.shrunk(information)
        self._keep(rows.to(device))

    @torch.no_grad()
    def move(self, logits: Tensor, labels: Tensor) -> None:
        """Q^y <- m Q^y + (1 - m) mean of the batch, for the classes in the batch; summed over ranks first.

        Args:
            logits: `[n, C]` of the current model.
            labels: int64 `[n]`.
        """
        assert self._rows is not None, "set() comes first"
        information = ClassInformation(logits.shape[1], separation=False, device=self._rows.device)
        information.update(logits, labels)
        information.all_reduce()
        seen = (information.counts > 0)[:, None]
        mean = information.centroids().to(self._rows.device)
        moved = self.momentum * self._rows + (1 - self.momentum) * mean
        self._keep(torch.where(seen, moved, self._rows))

    def state(self) -> Tensor:
        """The rows as they are, zeros included."""
        assert self._rows is not None, "set() comes first"
        return self._rows

    def restore(self, rows: Tensor) -> None:
        """Takes what `state` gave."""
        self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        self._rows, self._floored = rows, floored(rows)


class ClassBalancedBatches(Sampler[list[int]]):
    """Batches with equally many samples of each of a few classes, all classes in turn; for `MovingCentroids.move`.

    Args:
        labels: label of each sample of the data set.
        per_class: samples of a class in a batch, drawn without replacement where the class has as many.
        classes_per_batch: how many classes; all if absent.
        seed: of the choice; every iteration draws anew, reproducibly.
    """

    def __init__(
        self, labels: Sequence[int], *, per_class: int = 8, classes_per_batch: int | None = None, seed: int = 0
    ) -> None:
        found = torch.as_tensor(labels)
        self.members = [torch.nonzero(found == label).flatten() for label in found.unique()]
        if not self.members:
            raise UsageError("labels: none; class-balanced batches need a labelled data set")
        self.per_class = per_class
        self.width = min(classes_per_batch or len(self.members), len(self.members))
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def restart(self) -> None:
        """Draws again what was drawn first: what one training drew does not change the next."""
        self.generator.manual_seed(self.seed)

    def __len__(self) -> int:
        return (len(self.members) + self.width - 1) // self.width

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.members), generator=self.generator).tolist()
        for start in range(0, len(order), self.width):
            batch: list[int] = []
            for number in order[start : start + self.width]:
                members = self.members[number]
                chosen = torch.randperm(len(members), generator=self.generator)
                repeats = -(-self.per_class // len(members))
                batch += members[chosen.repeat(repeats)[: self.per_class]].tolist()
            yield batch
