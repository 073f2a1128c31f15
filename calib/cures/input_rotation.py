# SPDX-License-Identifier: Apache-2.0
"""`InputRotation`: an orthogonal change of the channels that a linear layer reads, computed as they arrive.

QuaRot (Ashkboos et al. 2024, section 4): with an orthogonal R, ``(x R) (W R)^T = x W^T``, and x R has no outlier
channels. R is block-diagonal, so that any even width will do and one block fits a cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from calib.cures.hadamard import hadamard, power_of_two_in
from calib.cures.input_hook import change_of
from calib.errors import UsageError
from calib.quantized.recent import Recent

__all__ = ["LARGEST_BLOCK", "InputRotation", "on_columns", "random_signs", "rotation_of"]

LARGEST_BLOCK = 512
"""A float32 block of 512 x 512 is 1 MB: it stays in cache."""


class InputRotation:
    """R of one width: signs, then a Hadamard matrix on each block of neighbouring channels.

    Args:
        width: channels.
        block: channels per block at most; the largest power of two that divides the width is taken up to this.
        signs_seed: channel j is negated first if bit j of SHAKE-256 of the seed's decimal digits is set (lowest bit of
            a byte first); none are negated without a seed.

    Attributes:
        block: channels per block.
        signs: float32 ``[width]``, or None.

    Raises:
        UsageError: the width is odd, or the block is no power of two above 1.
    """

    done = "rotated"

    def __init__(self, width: int, block: int = LARGEST_BLOCK, signs_seed: int | None = None) -> None:
        if block < 2 or block & (block - 1):
            raise UsageError(f"block {block}: no power of two above 1; choose 2, 4 ... {LARGEST_BLOCK}")
        self.width = width
        self.block = min(block, power_of_two_in(width))
        if self.block < 2:
            raise UsageError(f"width {width}: is odd, no Hadamard matrix divides it; leave this layer as it is")
        self.signs = None if signs_seed is None else random_signs(width, signs_seed)
        self._matrix = hadamard(self.block).sign()
        self._root = torch.tensor(float(self.block), dtype=torch.float64).sqrt()
        self._placed: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._recent: Recent[torch.Tensor] = Recent()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """``x R`` for ``[..., width]``, computed in float32 at least and rounded once to the dtype of x."""
        wide = _wide(x)
        matrix, signs = self._in(wide)
        return self._times(wide if signs is None else wide * signs, matrix).to(x.dtype)

    def rotate_back(self, x: torch.Tensor) -> torch.Tensor:
        """``x R^T`` for ``[..., width]``, computed as in `rotate`."""
        wide = _wide(x)
        matrix, signs = self._in(wide)
        result = self._times(wide, matrix)  # the block is symmetric
        return (result if signs is None else result * signs).to(x.dtype)

    def forget(self) -> None:
        """Lets go of the last rotated tensor."""
        self._recent.forget()

    def change_once(self, x: torch.Tensor) -> torch.Tensor:
        """`rotate`, or its last result if that is of this very tensor: q, k and v read one."""
        return self._recent.of(x, self, lambda: self.rotate(x))

    def _times(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Sums and differences, then one division: the very operations of compressed-tensors, so the very bits."""
        result: torch.Tensor = (x.unflatten(-1, (-1, self.block)) @ matrix).flatten(-2) / self._root
        return result

    def _in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = (x.dtype, x.device)
        if key not in self._placed:
            signs = None if self.signs is None else self.signs.to(x.device, x.dtype)
            self._placed[key] = self._matrix.to(x.device, x.dtype), signs
        return self._placed[key]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def random_signs(width: int, seed: int) -> torch.Tensor:
    """Signs that any program can derive from a seed, float32 ``[width]``; see `InputRotation`."""
    stream = hashlib.shake_256(str(seed).encode()).digest(-(-width // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:width]
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def rotation_of(module: nn.Module) -> InputRotation | None:
    """The rotation of a module's input, if there is one."""
    change = change_of(module)
    return change if isinstance(change, InputRotation) else None


def on_columns(module: nn.Module, matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A weight ``[outputs, inputs]`` whose rows are changed as they were before any rotation of the module's input."""
    rotation = rotation_of(module)
    return change(matrix) if rotation is None else rotation.rotate(change(rotation.rotate_back(matrix)))
