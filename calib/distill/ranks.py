# SPDX-License-Identifier: Apache-2.0
"""`Ranks`: the processes of `accelerate launch`, each training on its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from calib.errors import UsageError

__all__ = ["Ranks"]


class Ranks:
    """What several processes do differently from one; with one process nothing.

    All read the same batches in the same order, take every n-th sample of each, and average gradients: up to the order
    of float sums that is the training of one process on whole batches, whatever the framework's own parameters. Not so
    where a loss compares the samples of a batch, and for batch normalisation: these see one process's samples.

    Args:
        cpu: gather over CPUs even if there are GPUs.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # set by `accelerate launch` and `torchrun`
        self._state = PartialState(cpu=cpu) if several else None
        self.rank = 0 if self._state is None else int(self._state.process_index)
        self.count = 1 if self._state is None else int(self._state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, batch: Any) -> Any:
        """This process's samples of a batch.

        Raises:
            UsageError: fewer samples than processes.
        """
        if self.count == 1:
            return batch
        if isinstance(batch, Mapping):
            return {key: self._cut(part) if isinstance(part, Tensor) else part for key, part in batch.items()}
        if isinstance(batch, Sequence):
            return tuple(self._cut(part) for part in batch)
        raise UsageError(f"batch of type {type(batch).__name__}: cannot be divided among {self.count} processes")

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean over the processes, in place."""
        if self.count == 1:
            return
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.copy_(reduce(parameter.grad, reduction="mean"))

    def same_start(self, modules: Iterable[nn.Module]) -> None:
        """Gives every process the weights of the first."""
        if self.count == 1:
            return
        with torch.no_grad():
            for module in modules:
                for tensor in [*module.parameters(), *module.buffers()]:
                    tensor.copy_(broadcast(tensor.detach().clone()))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """Ends the talk of the processes, once all are done: one that exits in the middle of it may abort.

        The last call of a program; no `Ranks` of this process can be used afterwards.
        """
        if self._state is not None:
            self._state.wait_for_everyone()
            self._state.destroy_process_group()

    def _cut(self, part: Tensor) -> Tensor:
        if len(part) < self.count:
            raise UsageError(f"batch of {len(part)} samples for {self.count} processes: make it larger")
        return part[self.rank :: self.count]
