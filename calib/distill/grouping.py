# SPDX-License-Identifier: Apache-2.0
"""Centroid rows for tens of thousands of classes: frequent tokens have one each, the others share by frequency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.distill.information import ClassInformation
from calib.errors import UsageError

__all__ = ["BYTES_PER_ENTRY", "RowGrouping", "frequent_rows"]

BYTES_PER_ENTRY = 24
"""Of a row and output at the peak: float64 sums and means, float32 rows before and after the floor."""


@dataclass(frozen=True)
class RowGrouping:
    """Which row a label reads, and how rows of few samples lean on the mean of all.

    The CMI over shared rows is an upper bound of the CMI over labels, see `InformationSummary`. In training a row is
    (n Q + k Q_all) / (n + k) with n its samples and k the shrinkage: a rare token's own row would be made of a handful
    of outputs, and the loss would push them away from each other.
    """

    rows: int
    row_of_label: Tensor
    own_share: float
    shrinkage: float = 16.0

    @property
    def memory_bytes(self) -> int:
        """Peak of the rows in training and measuring, on the device of the model."""
        return BYTES_PER_ENTRY * self.rows * len(self.row_of_label)

    def shrunk(self, information: ClassInformation) -> Tensor:
        """Rows for `mcmi_loss`, float64 `[rows, V]`."""
        everything = information.sums.sum(dim=0) / information.counts.sum()
        weight = (information.counts / (information.counts + self.shrinkage))[:, None]
        rows = information.centroids()
        # in place: a second array of this size would double the memory
        return rows.mul_(weight).add_((1 - weight) * everything)


def frequent_rows(
    counts: Tensor, *, memory_bytes: int = 1 << 30, min_count: int = 50, buckets: int = 8, shrinkage: float = 16.0
) -> RowGrouping:
    """One row for each token seen often enough, as many as the memory holds; the rest in buckets of like frequency.

    Args:
        counts: how often each label occurs, int64 `[V]`.
        memory_bytes: bound of `RowGrouping.memory_bytes`.
        min_count: occurrences that earn a row.
        buckets: rows for all others; each takes about as many occurrences as the next.
        shrinkage: k, in samples.

    Raises:
        UsageError: the memory does not hold the buckets and one row more.
    """
    classes = len(counts)
    limit = memory_bytes // (BYTES_PER_ENTRY * classes)
    if limit <= buckets:
        needed = BYTES_PER_ENTRY * classes * (buckets + 1)
        raise UsageError(
            f"row memory {memory_bytes / 1e6:.0f} MB: {buckets} shared rows and one more of {classes} outputs "
            f"need {needed / 1e6:.0f} MB; allow more or fewer buckets"
        )
    order = torch.argsort(counts, descending=True, stable=True)
    own = min(int((counts >= min_count).sum()), int(limit) - buckets)
    row_of_label = torch.empty(classes, dtype=torch.long)
    row_of_label[order[:own]] = torch.arange(own)
    rest = order[own:]
    passed = torch.cumsum(counts[rest].double(), dim=0)
    total = float(passed[-1]) if len(passed) else 0.0
    # by what more frequent tokens have taken, so that no bucket stays empty because one token fills two
    before = (passed - counts[rest]) / total if total else torch.ones(len(rest), dtype=torch.float64)
    row_of_label[rest] = own + (before * buckets).floor().long().clamp(max=buckets - 1)
    everything = max(int(counts.sum()), 1)
    return RowGrouping(own + buckets, row_of_label, int(counts[order[:own]].sum()) / everything, shrinkage)
