# SPDX-License-Identifier: Apache-2.0
"""Sees, or replaces, query, key and value as attention gets them, after rotary embedding.

transformers' models fetch their attention function with `AttentionInterface.get_interface` on every call. Inside
the context that method is wrapped, so that whatever it returns passes on its arguments first. Registering an
implementation of our own would change the masks, which are dispatched by name; wrapping the lookup changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["transform_attention", "watch_attention"]

Report = Callable[[str, torch.Tensor], None]
Transform = Callable[[str, torch.Tensor], torch.Tensor]


@contextmanager
def watch_attention(reports: dict[int, Report]) -> Iterator[None]:
    """Calls ``reports[id(module)](part, tensor)`` for each of query, key, value of the modules named.

    Args:
        reports: per attention module, by `id`; the tensors are ``[blocks, heads, tokens, dim]``. Calls of all other
            modules, also of other models, pass untouched.
    """

    def reporting(report: Report) -> Transform:
        def transform(part: str, tensor: torch.Tensor) -> torch.Tensor:
            report(part, tensor)
            return tensor

        return transform

    with transform_attention({module: reporting(report) for module, report in reports.items()}):
        yield


@contextmanager
def transform_attention(transforms: dict[int, Transform]) -> Iterator[None]:
    """Has attention compute with ``transforms[id(module)](part, tensor)`` in the place of query, key and value.

    Args:
        transforms: per attention module, by `id`; called for query, key and value in this order. What a cache holds
            is not changed: keys and values of earlier tokens come out of it as they went in, and pass here again.
    """
    try:
        from transformers.modeling_utils import AttentionInterface
    except ImportError:
        yield
        return
    if not transforms:
        yield
        return
    original = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        attend = original(self, *args, **kwargs)

        def watched(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
        ) -> Any:
            transform = transforms.get(id(module))
            if transform is not None:
                query = transform("query", query)
                key = transform("key", key)
                value = transform("value", value)
            return attend(module, query, key, value, *rest, **more)

        return watched

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original
