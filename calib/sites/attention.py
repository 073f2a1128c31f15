# SPDX-License-Identifier: Apache-2.0
"""Sees query, key and value as attention gets them, after rotary embedding.

transformers' models fetch their attention function with `AttentionInterface.get_interface` on every call. Inside
the context that method is wrapped, so that whatever it returns reports its arguments first. Registering an
implementation of our own would change the masks, which are dispatched by name; wrapping the lookup changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["watch_attention"]

Report = Callable[[str, torch.Tensor], None]


@contextmanager
def watch_attention(reports: dict[int, Report]) -> Iterator[None]:
    """Calls ``reports[id(module)](part, tensor)`` for each of query, key, value of the modules named.

    Args:
        reports: per attention module, by `id`; the tensors are ``[blocks, heads, tokens, dim]``. Calls of all other
            modules, also of other models, pass untouched.
    """
    try:
        from transformers.modeling_utils import AttentionInterface
    except ImportError:
        yield
        return
    if not reports:
        yield
        return
    original = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        attend = original(self, *args, **kwargs)

        def watched(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
        ) -> Any:
            report = reports.get(id(module))
            if report is not None:
                for part, tensor in (("query", query), ("key", key), ("value", value)):
                    report(part, tensor)
            return attend(module, query, key, value, *rest, **more)

        return watched

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original
