# SPDX-License-Identifier: Apache-2.0
"""`Recent`: remembers what was made of the last tensor, for the modules that read the same one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

__all__ = ["Recent"]

T = TypeVar("T")


class Recent(Generic[T]):
    """One result, and which tensor it was made of.

    A tensor is known by its Python object, referred to weakly, and its version, which counts in-place writes: memory
    is reused within one forward pass, and an address alone would take strangers for one tensor. Tensors of inference
    mode have no version, and are not remembered.
    """

    def __init__(self) -> None:
        self._held: tuple[weakref.ref[torch.Tensor], tuple[object, ...], T, int] | None = None

    def of(self, x: torch.Tensor, rule: object, make: Callable[[], T]) -> T:
        """The remembered result, or else ``make()``.

        Args:
            x: the tensor.
            rule: what makes the result of it, known by identity; must outlive this.
            make: called if nothing is remembered.
        """
        if x.is_inference():
            return make()
        state = (x._version, id(rule), torch.is_grad_enabled())
        if self._held is not None:
            source, then, result, version = self._held
            if source() is x and then == state and version == _version(result):
                return result
        made = make()
        self._held = (weakref.ref(x), state, made, _version(made))
        return made

    def forget(self) -> None:
        """Lets go of the result."""
        self._held = None


def _version(result: object) -> int:
    return result._version if isinstance(result, torch.Tensor) else 0
