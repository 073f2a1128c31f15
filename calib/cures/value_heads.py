# SPDX-License-Identifier: Apache-2.0
"""`find_value_heads`: pairs between which channels may be mixed within groups, as the values of one head may be.

Attention takes the same mean over tokens of all channels of a head, so a rotation of a head's values passes it and the
output projection can undo it. Whether a pair is of this kind, and how wide its heads are, is tried on the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.cures.linear import is_linear
from calib.cures.pairs import Pair, Pairs
from calib.cures.relation import same
from calib.cures.rotation import Rotation
from calib.cures.scope import Scope, capture_scopes, example_inputs

__all__ = ["ValueHeads", "find_value_heads"]

_SHARP = 3.0
"""Size of what linear layers return in the probe: weak queries and keys give all heads nearly the same attention, and
channels of different heads would seem to be free to mix."""


@dataclass(frozen=True, eq=False)
class ValueHeads:
    """A pair whose channels may be mixed in groups.

    Attributes:
        pair: values and the projection that reads them.
        size: channels per head; the rows of the pair, and the inputs of its consumers, come in runs of this many.
    """

    pair: Pair
    size: int

    def rotate_rows(self, rows: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What the producer returns, ``[..., outputs]``, with each head of its values rotated."""
        index = torch.from_numpy(self.pair.rows).to(rows.device)
        heads = rows[..., index].unflatten(-1, (-1, self.size))
        return rows.index_copy(-1, index, rotation.rotate(heads).flatten(-2))

    def rotate_columns(self, columns: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The weight of a consumer, ``[outputs, inputs]``, for rotated heads."""
        return rotation.rotate(columns.unflatten(-1, (-1, self.size))).flatten(-2)

    def rotate_back(self, inputs: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The input of a consumer, ``[..., inputs]``, as it was before its heads were rotated."""
        return rotation.rotate_back(inputs.unflatten(-1, (-1, self.size))).flatten(-2)


def find_value_heads(
    model: nn.Module, pairs: Pairs, example: torch.Tensor | Mapping[str, torch.Tensor] | None = None
) -> tuple[ValueHeads, ...]:
    """All pairs of a model whose channels may be mixed in groups, each with its widest groups, in order of execution.

    Args:
        model: as for `find_pairs`.
        pairs: of this model.
        example: see `find_pairs`.

    Raises:
        ModelError: the model does not run on the example.
    """
    inputs = example if isinstance(example, Mapping) else example_inputs(model, example)
    known: dict[object, int | None] = {}  # a block of the same shape is asked once
    found = []
    for scope in capture_scopes(model, inputs):
        prefix = scope.full_name("") + "." if scope.name else ""
        for pair in pairs:
            if pair.rule != "linear" or not pair.producer.startswith(prefix):
                continue
            key = (pair.producer.removeprefix(prefix), pair.channels, tuple(c.channels.size for c in pair.consumers))
            if key not in known:
                known[key] = _widest(scope, prefix, pair)
            size = known[key]
            if size is not None:
                found.append(ValueHeads(pair, size))
    return tuple(found)


def _widest(scope: Scope, prefix: str, pair: Pair) -> int | None:
    """The widest groups of channels that may be mixed; None if none may."""
    layers = {name: m for name, m in scope.module.named_modules() if is_linear(m)}
    loudness = _loudness(scope, layers)
    plain = _run(scope, layers, loudness, {}, {})
    for size in range(pair.channels, 1, -1):
        if pair.channels % size or not all(_in_runs(c.channels, size) for c in pair.consumers):
            continue
        heads, rotation = ValueHeads(pair, size), Rotation(size, seed=size)
        rows = {pair.producer.removeprefix(prefix): partial(heads.rotate_rows, rotation=rotation)}
        inputs = {c.module.removeprefix(prefix): partial(heads.rotate_back, rotation=rotation) for c in pair.consumers}
        if same(plain, _run(scope, layers, loudness, rows, inputs)):
            return size
    return None


_Changes = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


def _run(
    scope: Scope, layers: Mapping[str, nn.Module], loudness: Mapping[str, float], rows: _Changes, inputs: _Changes
) -> list[torch.Tensor]:
    """What the block returns with its linear layers made loud, and some of their outputs and inputs changed."""

    def before(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        return lambda _, args: (change(args[0]), *args[1:])

    def after(name: str) -> Callable[..., torch.Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> torch.Tensor | None:
            if not isinstance(output, torch.Tensor):  # a router may be a linear layer that returns more
                return None
            loud = output * loudness.get(name, 1.0)
            return rows[name](loud) if name in rows else loud

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(after(name)).remove)
            if name in inputs:
                hooks.callback(module.register_forward_pre_hook(before(inputs[name]), prepend=True).remove)
        return [t.clone() for t in scope.call()]


def _loudness(scope: Scope, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """By layer, the factor that gives its output the size `_SHARP`."""
    sizes: dict[str, float] = {}

    def meter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if isinstance(output, torch.Tensor):
                sizes.setdefault(name, float(output.square().mean().sqrt()))

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(meter(name)).remove)
        scope.call()
    return {name: _SHARP / size for name, size in sizes.items() if size > 0}


def _in_runs(channels: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> bool:
    """Whether inputs come in whole groups, each in order."""
    if channels.size % size or (channels < 0).any():
        return False
    runs = channels.reshape(-1, size)
    return bool((runs % size == np.arange(size)).all() and (runs // size == runs[:, :1] // size).all())
