# SPDX-License-Identifier: Apache-2.0
"""What a measurement says of the model after smoothing or scaling, without running it: ranges and channels, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calib.cures.scale import OnlineScaling
from calib.cures.smooth import Smoothing
from calib.measurement.artifact import Measurement
from calib.measurement.site import Site
from calib.statistics import SiteStatistics
from calib.statistics.range import Range
from calib.statistics.summation import FixedPoint

__all__ = ["scaled_ranges", "smoothed_ranges"]


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
    return _changed(measurement, divisors, np.divide)


def scaled_ranges(measurement: Measurement, scaling: OnlineScaling) -> Measurement:
    """The same for inputs that are multiplied by factors as they arrive."""
    return _changed(measurement, scaling.factors, np.multiply)


def _changed(measurement: Measurement, numbers: Mapping[str, NDArray[np.float32]], operation: np.ufunc) -> Measurement:
    sites = {}
    for name, site in measurement.sites.items():
        readers = [n.partition("#")[0].removesuffix(":input") for n in (name, *site.aliases)]
        found = next((numbers[reader] for reader in readers if reader in numbers), None)
        sites[name] = site if found is None else _with_channels(site, found, operation)
    return replace(measurement, sites=sites, weights={})


def _with_channels(site: Site, numbers: NDArray[np.float32], operation: np.ufunc) -> Site:
    statistics = site.statistics
    channels = statistics.channels
    assert channels is not None, "the numbers were computed from channels"
    low, high = operation(channels.minimum, numbers), operation(channels.maximum, numbers)
    old = statistics.range
    span = Range(low.min(1), high.max(1), old.count, old.nonfinite, (0, 0), (0, 0))
    changed = replace(channels, minimum=low, maximum=high, energy=FixedPoint.zeros(low.shape))
    return replace(
        site, statistics=SiteStatistics(span, statistics.documents, channels=changed, fault=statistics.fault)
    )
