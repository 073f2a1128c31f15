# SPDX-License-Identifier: Apache-2.0
"""`hadamard`: the orthogonal matrix that spreads one channel evenly over all others."""

from __future__ import annotations

import torch

from calib.errors import UsageError

__all__ = ["hadamard", "power_of_two_in"]


def hadamard(order: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix divided by the root of its order: symmetric, and its own inverse.

    Args:
        order: a power of two.

    Returns:
        float32 ``[order, order]``, all entries ``+-order^-0.5``.

    Raises:
        UsageError: the order is no power of two.
    """
    if order < 1 or order & (order - 1):
        raise UsageError(f"Hadamard matrix of order {order}: no power of two; choose 2, 4, 8 ...")
    matrix: torch.Tensor = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normalised: torch.Tensor = (matrix * order**-0.5).float()
    return normalised


def power_of_two_in(width: int) -> int:
    """The largest power of two that divides a width."""
    return width & -width
