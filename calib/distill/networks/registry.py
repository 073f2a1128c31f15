# SPDX-License-Identifier: Apache-2.0
"""Name -> factory of a classifier."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from calib.errors import UsageError

__all__ = ["NETWORKS", "make_network", "network"]

Factory = Callable[[int, int, int], nn.Module]
NETWORKS: dict[str, Factory] = {}
"""Name -> factory(classes, channels, size)."""


def network(name: str) -> Callable[[Factory], Factory]:
    """Registers a factory under a name."""

    def register(factory: Factory) -> Factory:
        NETWORKS[name] = factory
        return factory

    return register


def make_network(name: str, classes: int, *, channels: int = 3, size: int = 32) -> nn.Module:
    """A classifier with fresh weights from torch's global generator.

    Args:
        name: one of `NETWORKS`.
        classes: outputs.
        channels: of the input; a perceptron takes them as its number of inputs.
        size: height and width of the input in pixels.

    Raises:
        UsageError: an unknown name.
    """
    if name not in NETWORKS:
        raise UsageError(f"network {name!r}: unknown; choose one of {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name](classes, channels, size)
