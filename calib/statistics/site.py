# SPDX-License-Identifier: Apache-2.0
"""`SiteStatistics`: everything that is kept of one site, updated together and merged together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.statistics.channels import ChannelStatistics
from calib.statistics.documents import DocumentMaxima
from calib.statistics.fault import Fault
from calib.statistics.histogram import FloatHistogram
from calib.statistics.observation import Observation
from calib.statistics.peaks import PeakList
from calib.statistics.range import Range
from calib.statistics.ratios import TokenRatio
from calib.statistics.tokens import token_maxima

__all__ = ["SiteStatistics"]

Tensors = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """The statistics of one site. With ranges only, `histogram`, `channels`, `peaks` and `tokens` are absent.

    Law: field by field; commutative and associative because each field is.

    Attributes:
        range: exact extremes, counts and moments.
        documents: largest magnitude per document.
        histogram: distribution in 65,536 fixed bins.
        channels: extremes and energy per channel.
        peaks: the largest values and their places.
        tokens: distribution of the largest magnitude per token.
        fault: where the first non-finite value was.
        ratios: largest against median magnitude per token, where a protocol asked for it.
    """

    range: Range
    documents: DocumentMaxima
    histogram: FloatHistogram | None = None
    channels: ChannelStatistics | None = None
    peaks: PeakList | None = None
    tokens: FloatHistogram | None = None
    fault: Fault = field(default_factory=Fault)
    ratios: TokenRatio | None = None

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> SiteStatistics:
        """Of one batch, float32 ``[blocks, tokens, channels]``: the definition that kernels are tested against."""
        return cls(
            Range.observe(values, context),
            DocumentMaxima.observe(values, context),
            FloatHistogram.observe(values, context),
            ChannelStatistics.observe(values, context),
            PeakList.observe(values, context),
            token_maxima(values, context),
            Fault.observe(values, context),
        )

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """Of both sets of values; a field that one side lacks is dropped, for it would be incomplete."""
        return SiteStatistics(
            self.range.merge(other.range),
            self.documents.merge(other.documents),
            self.histogram and other.histogram and self.histogram.merge(other.histogram),
            self.channels and other.channels and self.channels.merge(other.channels),
            None if self.peaks is None or other.peaks is None else self.peaks.merge(other.peaks),
            self.tokens and other.tokens and self.tokens.merge(other.tokens),
            self.fault.merge(other.fault),
            self.ratios and other.ratios and self.ratios.merge(other.ratios),
        )

    def of(self, group: int) -> SiteStatistics:
        """Of one position group alone. Peaks and ratios, which do not tell groups apart, are left out."""
        return SiteStatistics(
            self.range.of(group),
            self.documents.of_group(group),
            self.histogram and self.histogram.of(group),
            self.channels and self.channels.of(group),
            tokens=self.tokens and self.tokens.of(group),
            fault=self.fault,
        )

    def to_tensors(self) -> Tensors:
        """Arrays for a file, named ``<statistic>.<field>``."""
        return {
            f"{statistic}.{name}": array
            for statistic in _FIELDS
            if (part := getattr(self, statistic)) is not None
            for name, array in part.to_tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> SiteStatistics:
        """The inverse of `to_tensors`."""
        parts: dict[str, Tensors] = {}
        for key, array in tensors.items():
            statistic, _, name = key.partition(".")
            parts.setdefault(statistic, {})[name] = array
        fields: dict[str, Any] = {name: _FIELDS[name].from_tensors(part) for name, part in parts.items()}
        return cls(**fields)


_FIELDS: dict[str, Any] = {
    "range": Range,
    "documents": DocumentMaxima,
    "histogram": FloatHistogram,
    "channels": ChannelStatistics,
    "peaks": PeakList,
    "tokens": FloatHistogram,
    "fault": Fault,
    "ratios": TokenRatio,
}
