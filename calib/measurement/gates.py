# SPDX-License-Identifier: Apache-2.0
"""The conditions on a run itself, which must hold before scales are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calib.measurement.site import Gate, Site

__all__ = ["every_site_fired", "finite", "passes_complete"]

_SHOWN = 5


def every_site_fired(ports: int, silent: Sequence[str]) -> Gate:
    """Whether every selected port was reached; `silent` are the names of those that were not."""
    if not silent:
        return Gate("every_site_fired", True, f"{ports} ports")
    shown = ", ".join(silent[:_SHOWN]) + (f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else "")
    return Gate(
        "every_site_fired",
        False,
        f"never reached: {shown}; leave them out with --ignore, or use data that reaches them",
    )


def finite(sites: Mapping[str, Site]) -> Gate:
    """Whether no value was NaN or infinite; the first of each site is located."""
    faulty = [(name, site.statistics) for name, site in sites.items() if site.statistics.range.nonfinite_all]
    details = []
    for name, statistics in faulty[:_SHOWN]:
        place = statistics.fault.place
        where = ", first at document {}, position {}, channel {}".format(*place) if place else ""
        details.append(f"{name}: {statistics.range.nonfinite_all} values{where}")
    return Gate("finite", not faulty, "; ".join(details) or "no NaN, no infinity")


def passes_complete(failed: int) -> Gate:
    """Whether no forward pass broke off after some of its values had been counted."""
    detail = f"{failed} forward passes raised after some of their values had been counted" if failed else ""
    return Gate("complete_passes", not failed, detail or "no pass broke off")
