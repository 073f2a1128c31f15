# SPDX-License-Identifier: Apache-2.0
"""Sees what attention puts in the key/value cache, where it cannot be seen in transformers' attention interface.

Attention that is computed inline (falcon, gptj, bloom, mpt ...) still hands its keys, after rotary embedding, and its
values to `Cache.update`; so does attention that keeps a compressed latent instead of both (DeepSeek).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["attends", "caches", "calls_attention_interface", "updates_cache", "watch_cache"]

_CACHES = {"past_key_values", "past_key_value", "layer_past"}
Report = Callable[[str, torch.Tensor], None]


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether a forward dispatches through transformers' attention interface, where query, key and value can be seen.

    Read from the compiled code's names, through decorators: 94 modeling files compute attention inline instead.
    """
    return any({"ALL_ATTENTION_FUNCTIONS", "get_interface"} & set(code.co_names) for code in _codes(module))


def attends(module: nn.Module) -> bool:
    """Whether a module, whatever its model declares, is attention: it dispatches to attention functions or caches."""
    dispatches = any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _codes(module))
    return dispatches or updates_cache(module)


def caches(module: nn.Module) -> bool:
    """Whether an attention is given a cache, whatever it does with it."""
    return getattr(module, "is_decoder", True) is not False and any(
        _CACHES & set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) for code in _codes(module)
    )


def updates_cache(module: nn.Module) -> bool:
    """Whether a forward puts keys and values in a cache that it is given."""
    return any("update" in code.co_names and _CACHES & set(code.co_varnames) for code in _codes(module))


def _codes(module: nn.Module) -> Iterator[Any]:
    forward: Any = type(module).forward
    while forward is not None:
        code = getattr(forward, "__code__", None)
        if code is not None:
            yield code
        forward = getattr(forward, "__wrapped__", None)


def _is_read(cache: Any, layer: Any) -> bool:
    """Whether attention reads the layer of a cache otherwise than by `update`: sparse attention looks up its index."""
    layers = getattr(cache, "layers", [])
    return isinstance(layer, int) and layer < len(layers) and hasattr(layers[layer], "update_indexer")


@contextmanager
def watch_cache(reports: dict[nn.Module, Report], *, stores: bool = True) -> Iterator[None]:
    """Calls ``reports[module](part, tensor)`` for the key and the value that a module puts in its cache.

    Args:
        reports: per attention module; the tensors are ``[blocks, heads, tokens, dim]``, of the new tokens only. An
            update belongs to the innermost of these modules that runs; those of all other modules pass untouched.
        stores: whether caches keep what these modules put in. Without, a single pass over whole blocks computes what
            it would without a cache, and costs no memory.
    """
    try:
        from transformers.cache_utils import Cache
    except ImportError:
        yield
        return
    if not reports:
        yield
        return
    running: list[nn.Module] = []
    original = Cache.update

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if running:
            reports[running[-1]]("key", key)
            reports[running[-1]]("value", value)
            if not stores and not _is_read(self, args[0] if args else kwargs.get("layer_idx")):
                return key, value
        return original(self, key, value, *args, **kwargs)

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for module in reports:
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        Cache.update = update
        stack.callback(setattr, Cache, "update", original)
        yield
