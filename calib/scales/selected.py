# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a measurement get scales, and the gate in front of them: no scale comes from bad statistics."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calib.errors import ArtifactError, GateError, UsageError
from calib.scales.distribution import Distribution
from calib.scales.methods import BoundMethod
from calib.statistics.histogram import FloatHistogram

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.measurement.site import Site, WeightSite

__all__ = ["QUANTIZED_KINDS", "Selected", "distribution_of", "is_quantized", "select"]

QUANTIZED_KINDS = frozenset({"linear_input", "key", "value", "expert_input", "expert_hidden", "weight"})
"""What a deployment quantizes; a scale of any other kind informs."""


@dataclass(frozen=True)
class Selected:
    """Tensors to scale, and those a user left out on purpose, each by name in model order."""

    sites: dict[str, Site]
    weights: dict[str, WeightSite]
    ignored: list[str]

    def without(self, names: Collection[str]) -> Selected:
        """All but these."""
        sites = {name: site for name, site in self.sites.items() if name not in names}
        weights = {name: weight for name, weight in self.weights.items() if name not in names}
        return Selected(sites, weights, self.ignored)


def is_quantized(site: Site) -> bool:
    """Whether a deployment quantizes this tensor under any of its names."""
    return not QUANTIZED_KINDS.isdisjoint(site.kinds)


def select(measurement: Measurement, sites: Sequence[str] | None, ignore: Sequence[str]) -> Selected:
    """The tensors that match, each checked.

    Args:
        measurement: the source.
        sites: patterns of what is wanted, as `calib.sites.Selection` reads them; all if absent.
        ignore: patterns of what is not; they win.

    Raises:
        UsageError: a pattern matches nothing, or all together leave nothing.
        GateError: a tensor held NaN or infinite values, or no value at all.
    """
    activations, weights = dict(measurement.sites), dict(measurement.weights)
    ignored: list[str] = []
    if sites or ignore:
        activations, weights, ignored = _filtered(measurement, sites or (), ignore)
    if not activations and not weights:
        raise UsageError("sites: none of the measured tensors is left; `calib report` lists their names")
    _check(activations, weights)
    return Selected(activations, weights, ignored)


def _filtered(
    measurement: Measurement, sites: Sequence[str], ignore: Sequence[str]
) -> tuple[dict[str, Site], dict[str, WeightSite], list[str]]:
    # the package that owns the pattern language knows models and so loads PyTorch: only on demand
    from calib.sites.selection import Selection

    labels = {name: ([name, *site.aliases], site.kind, site.kinds) for name, site in measurement.sites.items()}
    labels |= {name: ([name], "weight", {"weight"}) for name in measurement.weights}
    Selection(sites, ignore)  # refuses what is no regular expression, by the name of its option
    already = {*measurement.run.sites_pattern, *measurement.run.ignore_pattern}  # obeyed while measuring
    for option, patterns in (("--sites", sites), ("--ignore", ignore)):
        for pattern in patterns:
            if pattern not in already and not any(Selection([pattern]).keeps(*label) for label in labels.values()):
                raise UsageError(
                    f"{option} {pattern}: matches nothing that was measured; `calib report` lists all names"
                )
    wanted = Selection(sites)
    left_out = Selection(ignore) if ignore else None
    chosen, ignored = set(), []
    for name, label in labels.items():
        if left_out is not None and left_out.keeps(*label[:2]):
            ignored.append(name)
        elif wanted.keeps(*label):
            chosen.add(name)
    activations = {name: site for name, site in measurement.sites.items() if name in chosen}
    return activations, {name: weight for name, weight in measurement.weights.items() if name in chosen}, ignored


def _check(sites: dict[str, Site], weights: dict[str, WeightSite]) -> None:
    ranges = [(name, site.statistics.range) for name, site in sites.items()]
    ranges += [(name, weight.statistics.range) for name, weight in weights.items()]
    broken = [(name, extent.nonfinite_all) for name, extent in ranges if extent.nonfinite_all]
    if broken:
        name, number = broken[0]
        more = f" (and {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
        place = sites[name].statistics.fault.place if name in sites else None
        where = "" if place is None else ", first at document {}, position {}, channel {}".format(*place)
        raise GateError(
            f"{name}{more}: {number} NaN or infinite values were seen{where}; "
            "measure in another dtype, or leave the tensor out with --ignore"
        )
    unseen = [name for name, extent in ranges if not extent.count_all]
    if unseen:
        more = f" (and {len(unseen) - 1} more tensors)" if len(unseen) > 1 else ""
        raise GateError(
            f"{unseen[0]}{more}: no value was seen; measure on data that reaches it, or leave it out with --ignore"
        )


def distribution_of(name: str, site: Site | WeightSite, method: BoundMethod) -> Distribution:
    """The distribution of a tensor; of its range alone if there is no histogram and the method needs none.

    Raises:
        ArtifactError: the method needs a histogram, and only ranges were measured.
    """
    statistics = site.statistics
    histogram = statistics.histogram
    if histogram is None:
        if method.method.needs_histogram:
            raise ArtifactError(
                f"{name}: only its range was measured, and {method.label} needs a histogram; "
                "use absmax, or measure without --statistics ranges"
            )
        histogram = FloatHistogram.empty()
    return Distribution.of(histogram, statistics.range, site.dtype)
