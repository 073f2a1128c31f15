# SPDX-License-Identifier: Apache-2.0
"""`loudest`: the layers that a return to float is likely to help most."""

from __future__ import annotations

from calib.measurement.artifact import Measurement
from calib.quantized import QuantizationPlan
from calib.statistics.observation import REST

__all__ = ["SHORTLIST", "loudest"]

SHORTLIST = 6


def loudest(ranges: Measurement, plan: QuantizationPlan, *, include_sink: bool) -> list[str]:
    """Layers whose range is largest against what their input usually is: the likely ones, to be measured."""
    ratio: dict[str, float] = {}
    for name, site in ranges.sites.items():
        channels = site.statistics.channels
        if channels is None:
            continue
        extent = site.statistics.range if include_sink else site.statistics.range.of(REST)
        typical = float(channels.of(REST).amax.mean())
        for reader in (n.removesuffix(":input") for n in (name, *site.aliases)):
            if reader in plan.inputs:
                ratio[reader] = extent.amax / max(typical, 1e-30)
    return sorted(ratio, key=lambda n: -ratio[n])[:SHORTLIST]
