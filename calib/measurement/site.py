# SPDX-License-Identifier: Apache-2.0
"""What was measured: `Site` for an activation, `WeightSite` for a parameter, `Gate` for a condition on both."""

from __future__ import annotations

from dataclasses import dataclass

from calib.statistics.site import SiteStatistics
from calib.statistics.weights import WeightStatistics

__all__ = ["Gate", "Site", "WeightSite"]


@dataclass(frozen=True, eq=False)
class Site:
    """One tensor position of a model and its statistics.

    Attributes:
        name: ``fqn:port``, with ``#call`` where a module is used several times in one forward pass.
        kind: what the tensor is, see `sites.KINDS`.
        module, port: the two halves of the name.
        layer: index of the block, if it is in one.
        dtype: of the tensor, e.g. bfloat16.
        channels: size of the channel axis.
        aliases: other names of the same tensor -> the kind under that name. Its own name is among them where that
            makes it of another kind: the input of a projection that is named for the norm it comes from.
        statistics: all that was kept.
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

    @property
    def kinds(self) -> set[str]:
        """Its kind and those of its aliases."""
        return {self.kind, *self.aliases.values()}


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
    """A condition that must hold before scales are written."""

    name: str
    passed: bool
    detail: str
