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

    With `keeps_mean` a reflection follows that takes the image of the ones back to the ones: ``1 R = 1``, so the mean
    over the channels stays, and so does what is left when it is subtracted. It adds about 1 / width to each entry but
    those of one channel, which are that image: four times as large at most, for 576 channels.

    Args:
        width: channels.
        seed: of the signs, see `InputRotation`.
        keeps_mean: see above.

    Attributes:
        outer: order of the small matrix.
        inner: order of the Hadamard matrix.
        even: whether all entries of R are equally large.
    """

    def __init__(self, width: int, seed: int, *, keeps_mean: bool = False) -> None:
        self.width = width
        self.outer, self.even = _outer(width)
        self.inner = width // self.outer
        self._signs = random_signs(width, seed)
        self._small = hadamard(self.outer) if self.even else _cosine(self.outer)
        self._large = hadamard(self.inner)
        self._mirror = self._of_the_ones() if keeps_mean else None

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """``x R`` for float32 ``[..., width]``."""
        small, large, signs = (t.to(x.device) for t in (self._small, self._large, self._signs))
        parts = (x * signs).unflatten(-1, (self.outer, self.inner)) @ large
        result: torch.Tensor = (small.T @ parts).flatten(-2)
        return self._reflected(result)

    def rotate_back(self, x: torch.Tensor) -> torch.Tensor:
        """``x R^T`` for float32 ``[..., width]``."""
        small, large, signs = (t.to(x.device) for t in (self._small, self._large, self._signs))
        parts = self._reflected(x).unflatten(-1, (self.outer, self.inner)) @ large  # symmetric
        result: torch.Tensor = (small @ parts).flatten(-2) * signs
        return result

    def _of_the_ones(self) -> torch.Tensor:
        """The unit vector across which the image of the ones, not reflected yet, is mirrored to the ones."""
        self._mirror = None
        ones = torch.full((self.width,), self.width**-0.5, dtype=torch.float64)
        across = self.rotate(ones.float()).double() - ones
        # a rotation that keeps them already needs none; 0 mirrors nothing
        length = across.norm()
        return (across / length if length > 1e-3 else torch.zeros_like(across)).float()

    def _reflected(self, x: torch.Tensor) -> torch.Tensor:
        if self._mirror is None:
            return x
        mirror = self._mirror.to(x.device)
        return x - 2 * (x @ mirror).unsqueeze(-1) * mirror


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
