# SPDX-License-Identifier: Apache-2.0
"""`WeightUse`: which weights a forward pass computes with, whether or not it calls their module.

Mixers of state-space and linear-attention models hand the weight of a short convolution to a fused function, and some
heads multiply by a slice of a weight: the module is there, but nothing that it would see exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["WeightUse"]


class WeightUse(TorchFunctionMode):
    """Within the block every function that is given a parameter marks it as used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._holders: dict[int, set[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(id(parameter), set()).add(name)
        self._used: set[int] = set()

    def modules(self, called: set[str]) -> set[str]:
        """Modules whose weights were used though none of those that hold them is among the modules that ran."""
        found = [self._holders[parameter] for parameter in self._used]
        return set().union(*(holders for holders in found if not holders & called))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Calls what was called."""
        for value in _flat(args, kwargs):
            if id(value) in self._holders:
                self._used.add(id(value))
        return func(*args, **(kwargs or {}))


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Iterator[Any]:
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from value
