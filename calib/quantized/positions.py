# SPDX-License-Identifier: Apache-2.0
"""`Positions`: knows where tokens of the running forward pass stand, so that the first ones can stay in float."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

__all__ = ["Positions"]


class Positions:
    """A context that watches the forward passes of a model.

    Args:
        model: the one that is called, or that holds the transformers model that is called.
        skip: how many first tokens of a row stay in float.
    """

    def __init__(self, model: nn.Module, skip: int) -> None:
        self.model, self.skip = model, skip
        self._stack = ExitStack()
        self._depth = 0
        self._past = 0
        self._batch: tuple[int, int] | None = None
        self._ends: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        inner = [m for m in self.model.modules() if m is not self.model and hasattr(m, "get_input_embeddings")]
        self._depth = 0
        for module in [self.model, *inner]:
            for handle in (
                module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._end, always_call=True),
            ):
                self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def on_end(self, call: Callable[[], None]) -> Callable[[], None]:
        """Has ``call`` called after each forward pass; returns what ends that."""
        self._ends.append(call)
        return self._ends.clear

    def apply(
        self,
        x: torch.Tensor,
        quantized: Callable[[torch.Tensor], torch.Tensor],
        *,
        in_float: Callable[[torch.Tensor], torch.Tensor] | None = None,
        with_past: bool = False,
    ) -> torch.Tensor:
        """Applies one function to a tensor, and another to the positions that stay in float.

        Args:
            x: ``[..., tokens, channels]``, or ``[rows * tokens, channels]``.
            quantized: for tokens that are rounded; keeps all axes but the last.
            in_float: for those that are not; the identity by default.
            with_past: the tokens of the cache come first in ``x``, as in keys and values.
        """
        first, rest = self.split(x, with_past=with_past)
        if first is None:
            return quantized(x)
        parts = [first if in_float is None else in_float(first)]
        if rest.shape[-2]:
            parts.append(quantized(rest))
        result = torch.cat(parts, -2)
        return result.reshape(*x.shape[:-1], result.shape[-1])

    def split(self, x: torch.Tensor, *, with_past: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The positions that stay in float, None if none does, and the others: views ``[..., tokens, channels]``."""
        skip = self.skip if with_past else self.skip - self._past
        if skip <= 0:
            return None, x
        view = x
        if x.ndim == 2 and self._batch is not None and x.shape[0] == self._batch[0] * self._batch[1]:
            view = x.unflatten(0, self._batch)
        if view.ndim < 3:
            return None, x
        return view[..., :skip, :], view[..., skip:, :]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or not self.skip:
            return
        self._batch = _batch(args, kwargs)
        length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
        self._past = 0 if length is None else int(length())

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            for call in self._ends:
                call()


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(rows, tokens) of token ids or embeddings, if the pass has any."""
    for name in ("input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor):
            return value.shape[0], value.shape[1]
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 2 and not args[0].is_floating_point():
        return args[0].shape[0], args[0].shape[1]
    return None
