# SPDX-License-Identifier: Apache-2.0
"""`Batches`: a loader read again and again, that knows where it is and can go back there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batches"]


class Batches:
    """Batches of a loader, without end, in epochs of a given number of steps or of one pass.

    A loader draws the order of a pass from torch's global generator when the pass begins. `state` therefore holds the
    generator as it was then and the position in the pass; `restore` begins that pass again and skips what was seen.

    Args:
        loader: can be read again and again.
        steps_per_epoch: batches that count as an epoch; None is one pass.
    """

    def __init__(self, loader: Iterable[Any], steps_per_epoch: int | None = None) -> None:
        self._loader, self._steps = loader, steps_per_epoch
        self._pass: Iterator[Any] | None = None
        self._begun = torch.get_rng_state()
        self._position = 0

    def epoch(self, done: int = 0) -> Iterator[Any]:
        """The batches of one epoch that are left after `done` of them."""
        if self._steps is not None:
            yield from itertools.islice(self.endless(), self._steps - done)
            return
        if not done:
            self._begin()
        yield from self._rest()

    def endless(self) -> Iterator[Any]:
        """Batch after batch, pass after pass."""
        if self._pass is None:
            self._begin()
        while True:
            yield from self._rest()
            self._begin()

    def state(self) -> dict[str, Any]:
        """Where the current pass began, and how many of its batches were handed out."""
        return {"begun": self._begun, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state. The caller sets the global generator afterwards."""
        begun: Tensor = state["begun"]
        torch.set_rng_state(begun)
        self._begin()
        for _ in range(int(state["position"])):
            self._next()

    def _begin(self) -> None:
        self._begun, self._position = torch.get_rng_state(), 0
        self._pass = iter(self._loader)

    def _next(self) -> Any:
        assert self._pass is not None
        batch = next(self._pass)
        self._position += 1
        return batch

    def _rest(self) -> Iterator[Any]:
        while True:
            try:
                batch = self._next()
            except StopIteration:
                return
            yield batch
