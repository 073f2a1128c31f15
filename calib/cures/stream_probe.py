# SPDX-License-Identifier: Apache-2.0
"""`StreamProbe`: asks a block which of its layers read the residual stream and which write it, by moving it.

With the outputs of all linear layers as wide as the stream held still, a change d of the block's input arrives as d (or
a multiple) at every layer that reads the stream and at the block's output, and nowhere else. A change d of one such
linear layer arrives as d at the block's output if, and only if, the layer writes into the stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calib.cures.linear import is_linear, rows_of
from calib.cures.relation import TOLERANCE, same
from calib.cures.scope import Scope, map_tensors, tensors_in
from calib.errors import ModelError
from calib.sites.structure import is_norm, is_projection

__all__ = ["StreamProbe"]

_INPUT = ""


class StreamProbe:
    """Questions to one block.

    Args:
        scope: the block; of several calls the first is looked at.
        width: channels of the stream.

    Raises:
        ModelError: the block does not read a tensor of this width.
    """

    def __init__(self, scope: Scope, width: int) -> None:
        self.scope = scope
        self._layers = {name: m for name, m in scope.module.named_modules() if is_norm(m) or _holds_weights(m)}
        self._wide = {name for name, m in self._layers.items() if is_linear(m) and rows_of(m) == width}
        stream = next((t for t in tensors_in(scope.calls[0]) if t.shape[-1] == width), None)
        if stream is None:
            raise ModelError(f"{scope.name}: reads no tensor of {width} channels; rotate inputs online")
        self._stream = stream
        size = stream.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        generator = torch.Generator().manual_seed(3)
        self._change = torch.randn(stream.shape, generator=generator).to(stream) * size
        self._held: dict[str, list[torch.Tensor]] = {}
        self._plain = self._run(None)
        self._moved = self._run(_INPUT)
        self._readers = [n for n, x in self._plain.reads.items() if self._follows(x, self._moved.reads.get(n))]

    def norms(self) -> list[str]:
        """Norms that read the stream, in order of execution, by their names in the model."""
        return [self.scope.full_name(name) for name in self._readers if is_norm(self._layers[name])]

    def check(self) -> None:
        """Sees that norms alone read the stream, and linear layers alone write it.

        Raises:
            ModelError: another layer reads it, or something else than a linear layer writes it.
        """
        direct = next((name for name in self._readers if not is_norm(self._layers[name])), None)
        if direct is not None:
            name = self.scope.full_name(direct)
            raise ModelError(f"{name}: reads the residual stream without a norm before it; rotate inputs online")
        if not self._follows(self._plain.output, self._moved.output):
            raise ModelError(
                f"{self.scope.name}: its output is not its input plus what linear layers add; rotate inputs online"
            )

    def writers(self) -> list[str]:
        """Linear layers whose output is added to the stream, in order of execution, by their names in the model.

        Raises:
            ModelError: a layer reaches the stream past something that is not linear, such as a norm behind it.
        """
        found = []
        for name in self._held:
            seen = self._run(name)
            if self._follows(self._plain.output, seen.output):
                found.append(self.scope.full_name(name))
            elif not same([self._plain.output], [seen.output]):
                after = [n for n in self._plain.reads if is_norm(self._layers[n]) and n not in self._readers]
                via = next((n for n in after if self._follows(self._plain.reads[n], seen.reads.get(n))), None)
                how = "a function that is not linear" if via is None else self.scope.full_name(via)
                raise ModelError(
                    f"{self.scope.full_name(name)}: reaches the residual stream through {how}; rotate inputs online"
                )
        return found

    def _follows(self, before: torch.Tensor, after: torch.Tensor | None) -> bool:
        """Whether a tensor changed by a multiple of the change, and by nothing else."""
        change = self._change
        if after is None or before.shape != after.shape or before.numel() != change.numel():
            return False
        moved = (after - before).reshape(change.shape)
        factor = (moved * change).sum() / change.square().sum()
        size = torch.maximum(before.abs(), after.abs()).reshape(change.shape).amax(-1, keepdim=True)
        bound = TOLERANCE * torch.maximum(size, change.abs().amax(-1, keepdim=True))
        return bool(factor.abs() > 1e-3) and bool(((moved - factor * change).abs() <= bound).all())

    def _run(self, moved: str | None) -> _Seen:
        """Calls the block, with the change added to its input or to what one layer returns."""
        reads: dict[str, torch.Tensor] = {}
        calls: Counter[str] = Counter()

        def reader(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                read = tensors_in([args, kwargs])[:1]
                if read and name not in reads:
                    reads[name] = read[0].clone()

            return hook

        def holder(name: str) -> Callable[..., torch.Tensor | None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> torch.Tensor | None:
                # a router may return more than a tensor; the tokens of an expert change with the input
                if not isinstance(output, torch.Tensor) or output.numel() != self._change.numel():
                    return None
                if moved is None:
                    self._held.setdefault(name, []).append(output.clone())
                held = self._held[name][calls[name]]
                calls[name] += 1
                return held + self._change.reshape(held.shape) if name == moved else held.clone()

            return hook

        with ExitStack() as hooks, torch.no_grad():
            for name, module in self._layers.items():
                hooks.callback(module.register_forward_pre_hook(reader(name), with_kwargs=True).remove)
                if name in self._wide:
                    hooks.callback(module.register_forward_hook(holder(name)).remove)
            args, kwargs = self.scope.calls[0]
            if moved == _INPUT:
                args, kwargs = map_tensors((args, kwargs), lambda t: t + self._change if t is self._stream else t)
            result = tensors_in(self.scope.module(*args, **kwargs))
        output = next((t for t in result if t.shape == self._change.shape), self._change * torch.nan)
        return _Seen(reads, output.clone())


@dataclass(frozen=True, eq=False)
class _Seen:
    """One run: by layer, in order of execution, what it read first; and the block's output."""

    reads: dict[str, torch.Tensor]
    output: torch.Tensor


def _holds_weights(module: nn.Module) -> bool:
    return bool(module._parameters) and not any(is_projection(m) for m in module.modules() if m is not module)
