# SPDX-License-Identifier: Apache-2.0
"""`Rotation`: an orthogonal matrix of any width that mixes all channels, cheap to multiply by."""

from __future__ import annotations

import math

import torch

from calib.cures.hadamard import hadamard, has_hadamard, power_of_two_in
from calib.cures.input_rotation import random_signs

__all__ = ["Rotation"]


class Rotation:
    """R = signs, then a Kronecker product: a small orthogonal matrix times a Hadamard matrix of a power of two.

    The small matrix is a Hadamard matrix where one is known, so that all entries of R are equally large; else the
    discrete cosine transform (DCT-II) of the width's odd part.

    Args:
        width: channels.
        seed: of the signs, see `InputRotation`.

    Attributes:
        outer: order of the small matrix.
        inner: order of the Hadamard matrix.
        even: whether all entries of R are equally large.
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width = width
        self.outer, self.even = _outer(width)
        self.inner = width // self.outer
        self._signs = random_signs(width, seed)
        self._small = hadamard(self.outer) if self.even else _cosine(self.outer)
        self._large = hadamard(self.inner)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """``x R`` for float32 ``[..., width]``."""
        small, large, signs = (t.to(x.device) for t in (self._small, self._large, self._signs))
        parts = (x * signs).unflatten(-1, (self.outer, self.inner)) @ large
        result: torch.Tensor = (small.T @ parts).flatten(-2)
        return result

    def rotate_back(self, x: torch.Tensor) -> torch.Tensor:
        """``x R^T`` for float32 ``[..., width]``."""
        small, large, signs = (t.to(x.device) for t in (self._small, self._large, self._signs))
        parts = x.unflatten(-1, (self.outer, self.inner)) @ large  # symmetric
        result: torch.Tensor = (small @ parts).flatten(-2) * signs
        return result


def _outer(width: int) -> tuple[int, bool]:
    """Order of the small matrix, and whether it is a Hadamard matrix."""
    odd = width // power_of_two_in(width)
    if odd == 1:
        return 1, True
    order = 4 * odd
    while width % order == 0:
        if has_hadamard(order):
            return order, True
        order *= 2
    return odd, False


def _cosine(order: int) -> torch.Tensor:
    """The orthonormal DCT-II, float32 ``[order, order]``; its columns are the waves (Ahmed et al. 1974)."""
    place, wave = torch.arange(order, dtype=torch.float64)[:, None], torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi * (place + 0.5) * wave / order) * math.sqrt(2 / order)
    matrix[:, 0] = order**-0.5
    return matrix.float()
