# SPDX-License-Identifier: Apache-2.0
"""What an MCMI teacher gained, seed by seed, against each of its rivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from calib.schema.distill import PairedGain, StudentRow

__all__ = ["paired_gains"]


def paired_gains(rows: Sequence[StudentRow]) -> list[PairedGain]:
    """MCMI minus mll, control and no teacher, seed by seed; zero-shot by recall of the omitted classes.

    Of students trained for quantization where there are any, otherwise of plain ones.

    Args:
        rows: students of all seeds.
    """

    def value(row: StudentRow) -> float:
        return row.accuracy if row.omitted_recall is None else row.omitted_recall

    friendly = [row for row in rows if row.variant == "friendly"]
    rows = friendly or rows
    gains = []
    mine = [row for row in rows if row.teacher == "mcmi"]
    for framework, condition in dict.fromkeys((row.framework, row.condition) for row in mine):
        chosen = {row.seed: value(row) for row in mine if (row.framework, row.condition) == (framework, condition)}
        against: Literal["mll", "control", "none"]
        for against in ("mll", "control", "none"):
            other = {
                row.seed: value(row)
                for row in rows
                if row.teacher == against and row.condition == condition and row.framework in (framework, "ce")
            }
            differences = [chosen[seed] - other[seed] for seed in chosen if seed in other]
            if not differences:
                continue
            count, mean = len(differences), sum(differences) / len(differences)
            spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count) if count > 1 else None
            gains.append(
                PairedGain(
                    framework=framework,
                    condition=condition,
                    against=against,
                    mean=mean,
                    standard_error=spread,
                    wins=sum(d > 0 for d in differences),
                    seeds=count,
                )
            )
    return gains
