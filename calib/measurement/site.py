# SPDX-License-Identifier: Apache-2.0
"""What was measured: `Site` for an activation, `WeightSite` for a parameter, `Gate` for a condition on both."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calib.statistics.site import SiteStatistics
from calib.statistics.weights import WeightStatistics

__all__ = ["Gate", "Site", "WeightSite"]


@dataclass(frozen=True, eq=False)
class Site:
    """One tensor position of a model and its statistics.

    Attributes:
        name: ``fqn:port``, with ``#call`` where a module is used several times in one forward pass, and ``@expert``.
        kind: what the tensor is, see `sites.KINDS`.
        module, port: the two halves of the name.
        layer: index of the block, if it is in one.
        dtype: of the tensor, e.g. bfloat16.
        channels: size of the channel axis.
        aliases: other names of the same tensor -> the kind under that name. Its own name is among them where that
            makes it of another kind: the input of a projection that is named for the norm it comes from.
        statistics: all that was kept.
        order: where it stands in the model: module, port, call, expert. Sites of shards are merged in this order.
        heads: how many heads the channels of a query, key or value are; ``[heads, dim]`` in this order.
        expert: index of the expert, if it is of one.
        forced: no token was routed to this expert; these are values of tokens that were sent to it regardless.
        parts: the statistics of each modality, where the model has several; `statistics` is of all of them.
    """

    name: str
    kind: str
    module: str
    port: str
    layer: int | None
    dtype: str
    channels: int
    aliases: dict[str, str]
    statistics: SiteStatistics
    order: tuple[int, ...] = ()
    heads: int | None = None
    expert: int | None = None
    forced: bool = False
    parts: dict[str, SiteStatistics] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        """Its kind and those of its aliases."""
        return {self.kind, *self.aliases.values()}

    @property
    def head_amax(self) -> NDArray[np.float32] | None:
        """Largest magnitude of each head, float32 ``[heads]``; None if it has none, or ranges only were measured."""
        channels = self.statistics.channels
        if self.heads is None or channels is None:
            return None
        amax: NDArray[np.float32] = channels.amax.reshape(self.heads, -1).max(axis=1)
        return amax


@dataclass(frozen=True, eq=False)
class WeightSite:
    """One parameter and its statistics; `tied` names the other modules that hold it."""

    name: str
    module: str
    layer: int | None
    dtype: str
    tied: tuple[str, ...]
    statistics: WeightStatistics
    kind: str = "weight"


@dataclass(frozen=True)
class Gate:
    """A condition that must hold before scales are written. `names` are all that it failed for, `detail` shows some."""

    name: str
    passed: bool
    detail: str
    names: tuple[str, ...] = ()
