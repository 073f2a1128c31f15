# SPDX-License-Identifier: Apache-2.0
"""Stratified splits and shares, by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calib.distill.data.records import Records
from calib.errors import UsageError

__all__ = ["SplitRecords", "split_off", "spread_over_classes", "stratified_share"]


@dataclass(frozen=True)
class SplitRecords:
    """Training data and validation data without a sample in common."""

    train: Records
    validation: Records


def stratified_share(labels: Sequence[int], share: float, seed: int = 0) -> list[int]:
    """Numbers of a share of the samples, sorted: of each class round(share x count), at least one.

    Args:
        labels: label of each sample.
        share: 0 < share <= 1.
        seed: of the choice. For one seed a smaller share is part of a larger one.

    Raises:
        UsageError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UsageError(f"share {share}: not in (0, 1]; pass 0.05 for 5 %")
    found = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for label in found.unique():
        members = torch.nonzero(found == label).flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        chosen += order[: max(1, round(share * len(members)))].tolist()
    return sorted(chosen)


def spread_over_classes(labels: Sequence[int], count: int) -> list[int]:
    """Numbers of at most `count` samples, the first of each class, then the second of each, and so on.

    Args:
        labels: label of each sample.
        count: 1 or more.
    """
    seen: dict[int, int] = {}
    ranked = []
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], label, number))
    return [number for _, _, number in sorted(ranked)[:count]]


def split_off(records: Records, share: float, seed: int = 0) -> SplitRecords:
    """Takes a stratified share away as validation data.

    Raises:
        UsageError: a share outside (0, 1), or nothing left to train on.
    """
    held_out = set(stratified_share(records.labels, share, seed))
    kept = [number for number in range(len(records)) if number not in held_out]
    if not kept:
        raise UsageError(f"validation share {share}: leaves nothing to train on; pass for example 0.1")
    return SplitRecords(records.select(kept), records.select(sorted(held_out)))
