# SPDX-License-Identifier: Apache-2.0
"""`hadamard`: orthogonal matrices that spread one channel evenly over all others."""

from __future__ import annotations

from math import isqrt

import torch

from calib.errors import UsageError

__all__ = ["hadamard", "has_hadamard", "power_of_two_in"]


def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix divided by the root of its order.

    Powers of two are Sylvester's (symmetric, hence their own inverse); others are Paley's first or second matrix
    (q + 1 or 2 q + 2 for a prime q; Paley 1933) doubled as often as needed.

    Args:
        order: a power of two, or 12, 20, 24, 28, 36 ...; see `has_hadamard`.

    Returns:
        float32 ``[order, order]``, all entries ``+-order^-0.5``.

    Raises:
        UsageError: these constructions have no matrix of the order.
    """
    core = _core(order)
    if core is None:
        raise UsageError(f"Hadamard matrix of order {order}: none is known here; choose a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normalised: torch.Tensor = (matrix * order**-0.5).float()
    return normalised


def has_hadamard(order: int) -> bool:
    """Whether `hadamard` has a matrix of this order."""
    return _core(order) is not None


def power_of_two_in(width: int) -> int:
    """The largest power of two that divides a width."""
    return width & -width


def _core(order: int) -> int | None:
    """The order of the matrix to start doubling from; 1 for a power of two."""
    if order < 1:
        return None
    odd = order // power_of_two_in(order)
    if odd == 1:
        return 1
    core = 4 * odd
    while core <= order:
        if order % core == 0 and (_is_prime(core - 1) or _second_prime(core) is not None):
            return core
        core *= 2
    return None


def _second_prime(order: int) -> int | None:
    q = order // 2 - 1
    return q if q % 4 == 1 and _is_prime(q) else None


def _paley(order: int) -> torch.Tensor:
    first = _is_prime(order - 1)
    q = order - 1 if first else order // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[1:, 1:] = character[(index[:, None] - index) % q]
    conference[0, 1:] = 1.0
    conference[1:, 0] = -1.0 if first else 1.0  # skew for q = 3 mod 4, symmetric for q = 1 mod 4
    identity = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return conference + identity
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    turn = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(identity, turn)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, isqrt(number) + 1))
