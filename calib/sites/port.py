# SPDX-License-Identifier: Apache-2.0
"""`Port`: a place where a tensor can be seen, before it is known which ports see the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "Axes", "Port"]

Axes = Literal["tokens", "heads", "channels_first", "routed"]
"""Layout of a raw tensor: ``[blocks, tokens, ...]``, ``[blocks, heads, tokens, dim]``, ``[blocks, channels, ...]``, or
``[rows, channels]`` of the tokens that a router sends to one expert."""

KINDS = (
    "embedding",
    "final_norm",
    "router",
    "gate",
    "query",
    "key",
    "value",
    "kv_cache",
    "expert_input",
    "expert_gate",
    "expert_hidden",
    "expert_output",
    "attention_output",
    "mlp_output",
    "residual",
    "norm_output",
    "linear_output",
    "linear_input",
)
"""Site kinds. Where several ports see one tensor, the first of these names it; the others stay in its aliases."""

_RANK = {"input": 0, "query": 1, "key": 2, "value": 3, "cache_key": 4, "cache_value": 5, "hidden": 7, "output": 8}
_OTHER = 6  # what an expert's first projection makes, whatever its parameter is called


@dataclass(frozen=True)
class Port:
    """One tensor position of one module.

    Attributes:
        module: fully qualified module name; empty for the model itself.
        port: input, output, query, key, value; what attention keeps where that is neither key nor value: cache_key,
            cache_value; of fused experts also gate_up (after the name of the parameter) and hidden.
        kind: one of `KINDS`.
        order: position of the module in `named_modules()`.
        layer: index of the block that the module belongs to, if any.
        axes: layout of the raw tensor.
        index: which element, where the module returns a tuple; named by ``output.1`` unless it is the first.
        weak: its kind counts only if no other port of the same tensor has one: the input of a norm is the residual
            stream in the middle of a block, unless it is the output of something that names it better.
        optional: nothing is missing if it is never seen: activation functions, which models also compute otherwise.
        cached: seen on its way into the cache, where attention itself cannot be watched.
    """

    module: str
    port: str
    kind: str
    order: int
    layer: int | None = None
    axes: Axes = "tokens"
    index: int = 0
    weak: bool = False
    optional: bool = False
    cached: bool = False

    @property
    def name(self) -> str:
        """``fqn:port``, without the call that a module used several times appends."""
        return f"{self.module}:{self.port}" + (f".{self.index}" if self.index else "")

    @property
    def sort_key(self) -> tuple[int, int]:
        """Module order, then the order in which a module's ports are passed."""
        return self.order, _RANK.get(self.port, _OTHER)
