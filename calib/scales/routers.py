# SPDX-License-Identifier: Apache-2.0
"""Routers stay in floating point: an error that no norm would notice there sends a token to another expert."""

from __future__ import annotations

from collections.abc import Collection, Iterable

__all__ = ["IN_FLOAT", "router_layers"]

IN_FLOAT = "a router stays in floating point: a small error there sends tokens to other experts"


def router_layers(routers: Iterable[str], linears: Collection[str]) -> set[str]:
    """Linear layers that decide which experts a token goes to.

    Models declare which modules give router logits, not which layers these come from: some are a linear layer, some
    hold one and choose after it. One that holds several is a whole block or attention with its experts inside.

    Args:
        routers: names of modules that give router logits.
        linears: names of all linear layers.
    """
    found: set[str] = set()
    for router in routers:
        inside = [name for name in linears if name == router or name.startswith(f"{router}.")]
        if router in inside or len(inside) == 1:
            found.add(router if router in inside else inside[0])
    return found
