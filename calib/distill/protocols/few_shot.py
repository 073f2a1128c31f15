# SPDX-License-Identifier: Apache-2.0
"""Few-shot: the student sees a stratified share of the data, the teacher saw all; all students take equal steps."""

from __future__ import annotations

from collections.abc import Sequence

from calib.distill.data import Records, stratified_share
from calib.distill.protocols.condition import Condition

__all__ = ["few_shot_conditions"]


def few_shot_conditions(records: Records, shares: Sequence[float], seed: int) -> list[Condition]:
    """One condition per share. A smaller share of one seed is part of a larger one.

    Args:
        records: the whole training data.
        shares: 0.05 is 5 %.
        seed: of the choice.
    """
    return [
        Condition(f"{share * 100:g} %", records.select(stratified_share(records.labels, share, seed)))
        for share in shares
    ]
