# SPDX-License-Identifier: Apache-2.0
"""The protocol of arXiv 2605.15572, sections 1.2 to 1.4: what it asks of a run, and M of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from calib.errors import GateError, UsageError
from calib.measurement.artifact import Measurement
from calib.measurement.site import Site
from calib.protocols.paper_sites import MAXIMUM_KINDS, PaperSite, paper_sites
from calib.protocols.published import published_maxima
from calib.protocols.rows import CheckpointMaximum, SiteRow
from calib.scales import Distribution
from calib.statistics import SiteStatistics

__all__ = ["PROTOCOL", "Comparison", "compare_maxima", "joined", "measured_rows", "missing_sites", "protocol_dtype"]

PROTOCOL = "max-activations"


@dataclass(frozen=True)
class Comparison:
    """M of the measured model among those that were published.

    Attributes:
        measured: of the model at hand.
        published: the others, largest first.
        missing: published names that a model of this depth should have and this one has not.
    """

    measured: CheckpointMaximum
    published: list[CheckpointMaximum]
    missing: list[str]

    @property
    def ranked(self) -> list[CheckpointMaximum]:
        """All of them, largest M first; of equal ones the measured model first."""
        return sorted([self.measured, *self.published], key=lambda m: -m.magnitude)

    @property
    def rank(self) -> int:
        """Place of the measured model, 1 = largest M."""
        return 1 + sum(m.magnitude > self.measured.magnitude for m in self.published)


def protocol_dtype(*, add_bos: bool, chat_template: bool, statistics: str, dtype: str, protocol: str = PROTOCOL) -> str:
    """Checks the options of a run and returns its dtype: bfloat16, unless another one was asked for.

    Raises:
        UsageError: an option contradicts the protocol.
    """
    for option, given in (("--add-bos", add_bos), ("--chat-template", chat_template)):
        if given:
            raise UsageError(
                f"{option}: --protocol {protocol} runs plain text without BOS; leave out one of the two options"
            )
    if statistics != "full":
        raise UsageError(f"--statistics {statistics}: --protocol {protocol} needs histograms; pass --statistics full")
    return "bfloat16" if dtype == "auto" else dtype


def compare_maxima(measurement: Measurement, published: Sequence[CheckpointMaximum] | None = None) -> Comparison:
    """M of a measurement beside published ones.

    Args:
        measurement: with histograms.
        published: the 27 of the paper if absent.

    Raises:
        GateError: no block output was measured, so M would mean nothing.
        UsageError: the measurement holds ranges only.
    """
    rows = measured_rows(measurement)
    known = published_maxima() if published is None else list(published)
    return Comparison(CheckpointMaximum.of(rows), known, missing_sites([row.site for row in rows]))


def measured_rows(measurement: Measurement) -> list[SiteRow]:
    """A measurement in the fields of the paper, in the order of a forward pass.

    Raises:
        GateError, UsageError: see `compare_maxima`.
    """
    named = {site: joined(held) for site, held in paper_sites(measurement).items()}
    named = {site: one for site, one in named.items() if one.statistics.range.count_all}
    hidden = [(site, one) for site, one in named.items() if site.kind == "hidden" and not site.stack]
    if not hidden:
        raise GateError(
            f"{measurement.model.name}: no output of a block was measured, so there is no M; "
            "leave --sites and --ignore out, and see `calib sites MODEL`"
        )
    return [_row(measurement, site, one, len(hidden), hidden[0][1].channels) for site, one in named.items()]


def missing_sites(sites: Sequence[PaperSite]) -> list[str]:
    """Names that the five kinds should have in every layer and that are not there."""
    layers = {site.layer for site in sites if site.kind == "hidden" and not site.stack}
    depth = max((layer for layer in layers if layer is not None), default=-1) + 1
    expected = [PaperSite(kind, layer) for layer in range(depth) for kind in ("attn_output", "mlp_output", "hidden")]
    expected = [PaperSite("embedding_output"), *expected, PaperSite("final_layernorm")]
    return [site.name for site in expected if site not in set(sites)]


def joined(sites: Sequence[Site]) -> Site:
    """The calls of one module as one site, its first with the statistics of all."""
    first = sites[0]
    if len(sites) == 1:
        return first
    together = reduce(SiteStatistics.merge, [site.statistics for site in sites])
    return Site(
        first.name, first.kind, first.module, first.port, first.layer, first.dtype, first.channels, {}, together
    )


def _row(measurement: Measurement, site: PaperSite, one: Site, layers: int, width: int) -> SiteRow:
    values, histogram, ratios = one.statistics.range, one.statistics.histogram, one.statistics.ratios
    if histogram is None:
        raise UsageError(f"{measurement.model.name}: measured with --statistics ranges; measure again with full ones")
    eligible = site.kind in MAXIMUM_KINDS
    median, q99, q999 = histogram.quantiles_abs((0.5, 0.99, 0.999))
    return SiteRow(
        checkpoint=measurement.model.name,
        family=measurement.model.model_type,
        model_type=measurement.model.model_type,
        num_hidden_layers=layers,
        hidden_size=width,
        site=site,
        min=values.min,
        max=values.max,
        mean=values.mean,
        std=math.sqrt(max(values.rms**2 - values.mean**2, 0.0)),
        rms=values.rms,
        abs_mean=float(Distribution.of(histogram, values, one.dtype).folded.sums_below[-1]) / values.count_all,
        abs_median=median if eligible else None,
        abs_q99=q99 if eligible else None,
        abs_q999=q999 if eligible else None,
        count=float(values.count_all),
        massive_tokens=int(ratios.passed.sum()) if eligible and ratios is not None else None,
    )
