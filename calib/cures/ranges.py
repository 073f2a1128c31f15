# SPDX-License-Identifier: Apache-2.0
"""What a measurement says of the model after smoothing, without running it: ranges and channels, exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calib.cures.smooth import Smoothing
from calib.measurement.artifact import Measurement
from calib.measurement.site import Site
from calib.statistics import SiteStatistics
from calib.statistics.range import Range
from calib.statistics.summation import FixedPoint

__all__ = ["smoothed_ranges"]


def smoothed_ranges(measurement: Measurement, smoothing: Smoothing) -> Measurement:
    """The measurement with the inputs of smoothed layers divided by their scales; weights are left out.

    Dividing a channel by s divides its extremes by s, so these are what a new measurement would find, but for the
    rounding of the model itself. Histograms, peaks and moments of the changed tensors are gone: take a new measurement
    of the model that is chosen.

    Args:
        measurement: of the model before smoothing, with channels.
        smoothing: what is applied.
    """
    divisors: dict[str, NDArray[np.float32]] = {}
    for pair, scales in zip(smoothing.pairs, smoothing.scales, strict=True):
        for consumer in pair.consumers:
            one = np.where(consumer.channels < 0, np.float32(1), scales[consumer.channels])
            before = divisors.get(consumer.module)
            divisors[consumer.module] = one if before is None else before * one  # pairs cover different channels
    sites = {}
    for name, site in measurement.sites.items():
        readers = [n.partition("#")[0].removesuffix(":input") for n in (name, *site.aliases)]
        found = next((divisors[reader] for reader in readers if reader in divisors), None)
        sites[name] = site if found is None else _divided(site, found)
    return replace(measurement, sites=sites, weights={})


def _divided(site: Site, divisor: NDArray[np.float32]) -> Site:
    statistics = site.statistics
    channels = statistics.channels
    assert channels is not None, "a smoothing was computed from channels"
    low, high = channels.minimum / divisor, channels.maximum / divisor
    old = statistics.range
    span = Range(low.min(1), high.max(1), old.count, old.nonfinite, (0, 0), (0, 0))
    divided = replace(channels, minimum=low, maximum=high, energy=FixedPoint.zeros(low.shape))
    return replace(
        site, statistics=SiteStatistics(span, statistics.documents, channels=divided, fault=statistics.fault)
    )
