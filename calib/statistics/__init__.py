# SPDX-License-Identifier: Apache-2.0
"""Statistics of a site: exact, mergeable, and lossless enough to answer later questions offline.

Each is a commutative monoid: `empty` is its neutral element, `observe` maps a batch to it, `merge` combines two, and
`to_tensors` / `from_tensors` carry it through a file. They are plain numpy and know nothing of models.
"""

from __future__ import annotations

from calib.statistics.channels import ChannelStatistics
from calib.statistics.documents import DocumentMaxima
from calib.statistics.histogram import FloatHistogram
from calib.statistics.observation import REST, SINK, Observation
from calib.statistics.peaks import PeakList
from calib.statistics.range import Range
from calib.statistics.ratios import TokenRatio
from calib.statistics.site import SiteStatistics
from calib.statistics.weights import WeightStatistics

__all__ = [
    "REST",
    "SINK",
    "ChannelStatistics",
    "DocumentMaxima",
    "FloatHistogram",
    "Observation",
    "PeakList",
    "Range",
    "SiteStatistics",
    "TokenRatio",
    "WeightStatistics",
]
