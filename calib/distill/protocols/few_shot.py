# SPDX-License-Identifier: Apache-2.0
"""Few-shot: the student sees a stratified share of the data, the teacher saw all; all students take equal steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calib.distill.data import Records, stratified_share

__all__ = ["Condition", "few_shot_conditions"]


@dataclass(frozen=True)
class Condition:
    """What one student sees: a name, its records, the smallest number of samples of a class."""

    name: str
    records: Records
    per_class: int


def few_shot_conditions(records: Records, shares: Sequence[float], seed: int) -> list[Condition]:
    """One condition per share. A smaller share of one seed is part of a larger one.

    Args:
        records: the whole training data.
        shares: 0.05 is 5 %.
        seed: of the choice.
    """
    conditions = []
    for share in shares:
        chosen = records.select(stratified_share(records.labels, share, seed))
        counts = [chosen.labels.count(label) for label in set(chosen.labels)]
        conditions.append(Condition(f"{share * 100:g} %", chosen, min(counts)))
    return conditions
