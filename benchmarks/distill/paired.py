# SPDX-License-Identifier: Apache-2.0
"""Mean of differences between runs of one seed, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def mean_interval(values: Sequence[float], *, share: float = 0.95, digits: int = 4) -> dict[str, float | int | None]:
    """Mean, Student's t interval, and how many values are above 0."""
    count, mean = len(values), sum(values) / len(values)
    half = None
    if count > 1:
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
        half = float(stats.t.ppf((1 + share) / 2, count - 1)) * deviation / math.sqrt(count)
    return {
        "mean": round(mean, digits),
        "low": None if half is None else round(mean - half, digits),
        "high": None if half is None else round(mean + half, digits),
        "positive": sum(v > 0 for v in values),
        "n": count,
    }
