# SPDX-License-Identifier: Apache-2.0
"""Which rows of a fused projection could feed a consumer: hypotheses from arithmetic, for a probe to decide.

Seen in the field: ``[q | k | v]`` and ``[gate | up]`` one after the other (gpt2, phi3), ``[q, k, v]`` per head (bloom,
gpt_neox), ``[n queries, k, v]`` per group of heads (falcon), gate and up taking turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["row_slices"]


def row_slices(rows: int, channels: int) -> Iterator[NDArray[np.int64]]:
    """Sets of rows out of `rows` that may feed a consumer of `channels` inputs, the likeliest first.

    Yields:
        int64 row numbers, increasing; none of the sets is empty or whole.
    """
    index = np.arange(rows)
    if channels < 1 or rows <= channels:
        return
    if rows % channels == 0:
        parts = rows // channels
        for groups in _divisors(channels):
            table = index.reshape(groups, parts, channels // groups)
            for part in reversed(range(parts)):
                yield table[:, part].ravel()
    shared = (rows - channels) // 2  # of keys, and of values
    if (rows - channels) % 2 or channels % shared or shared == channels:
        return
    for groups in _divisors(shared):
        table = index.reshape(groups, rows // shared, shared // groups)
        for part in (-1, -2, 0):  # values last, before keys, or first of all
            yield table[:, part].ravel()


def _divisors(number: int) -> list[int]:
    """Divisors, smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]
