# SPDX-License-Identifier: Apache-2.0
"""Memory for what outlives a batch, kept out of the heap that activations come and go in.

A few bytes that stay, allocated between activations of megabytes that are freed, keep the C library from reusing or
returning the room beside them. So state lives in blocks that are large enough to be mapped on their own. They are
zeroed lazily, and cost what is touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PAGE", "Arena", "PagePool"]

_BLOCK = 40 << 20  # bytes; above the largest threshold from which glibc's malloc maps memory (32 MiB)
_ALIGNMENT = 64
PAGE = 128
"""Bins of a page: all numbers of one sign and exponent."""


class Arena:
    """Hands out zeroed arrays that are freed together, when the last of them is gone."""

    def __init__(self) -> None:
        self._block = np.zeros(0, np.uint8)
        self._used = 0

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A zeroed array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._used + size > self._block.size:
            self._block, self._used = np.zeros(max(_BLOCK, size), np.uint8), 0
        array = self._block[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return array


class PagePool:
    """Pages of 128 counts for all histograms of a calibration.

    Attributes:
        pages: int64 ``[capacity, 128]``.
        used: int64 ``[1]``, pages handed out.
    """

    def __init__(self) -> None:
        self.pages = np.zeros((_BLOCK // (8 * PAGE), PAGE), np.int64)
        self.used = np.zeros(1, np.int64)

    def reserve(self, count: int) -> None:
        """Makes sure that `count` more pages are there."""
        used = int(self.used[0])
        if used + count > self.pages.shape[0]:
            grown = np.zeros((2 * self.pages.shape[0], PAGE), np.int64)
            grown[:used] = self.pages[:used]
            self.pages = grown
