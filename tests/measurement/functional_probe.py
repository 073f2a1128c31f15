# SPDX-License-Identifier: Apache-2.0
"""A naive second opinion: extremes of what torch's functions are given, read by replacing the functions themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Extent:
    """Smallest, largest, and how many."""

    low: float = float("inf")
    high: float = float("-inf")
    count: int = 0

    def take(self, values: torch.Tensor) -> None:
        self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
        self.count += values.numel()


@dataclass
class Seen:
    """By module and by expert; attention in the order of its calls."""

    reads: dict[str, Extent] = field(default_factory=dict)
    makes: dict[str, Extent] = field(default_factory=dict)
    experts: dict[tuple[str, str, int], Extent] = field(default_factory=dict)
    attention: list[tuple[Extent, Extent, Extent]] = field(default_factory=list)


@contextmanager
def functional_probe(model: nn.Module) -> Iterator[Seen]:
    """Within the block products and attention of torch's functional interface are watched."""
    seen = Seen()
    owners = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    fused = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.ndim == 3}

    def product(original: Any) -> Any:
        def call(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y = original(x, weight, *args, **kwargs)
            name = owners.get(id(weight))
            if name is not None:
                seen.reads.setdefault(name, Extent()).take(x)
                seen.makes.setdefault(name, Extent()).take(y)
            return y

        return call

    def grouped(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        y = original_grouped(x, weight, offs=offs, **kwargs)
        name, start = fused[weight.untyped_storage().data_ptr()], 0
        for expert, stop in enumerate(offs.tolist()):
            if stop > start:
                seen.experts.setdefault((name, "reads", expert), Extent()).take(x[start:stop])
                seen.experts.setdefault((name, "makes", expert), Extent()).take(y[start:stop])
            start = stop
        return y

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        extents = (Extent(), Extent(), Extent())
        for extent, tensor in zip(extents, (q, k, v), strict=True):
            extent.take(tensor)
        seen.attention.append(extents)
        return original_attend(q, k, v, *args, **kwargs)

    original_grouped, original_attend = F.grouped_mm, F.scaled_dot_product_attention
    replaced = {"linear": product(F.linear), "conv2d": product(F.conv2d)}
    replaced |= {"grouped_mm": grouped, "scaled_dot_product_attention": attend}
    held = {name: getattr(F, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(F, name, function)
        yield seen
    finally:
        for name, function in held.items():
            setattr(F, name, function)
