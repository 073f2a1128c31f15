# SPDX-License-Identifier: Apache-2.0
"""The record of one tensor in a scale file: its grid, its error, its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from calib.scales.distribution import Distribution
from calib.scales.error import UNKNOWN, expected_error
from calib.scales.grid import Grid, Step
from calib.scales.methods import BoundMethod
from calib.scales.selected import distribution_of
from calib.scales.shortest import shortest, shortest_error, shortest_list
from calib.scales.varying import dynamic_per_token_error, per_row_error
from calib.scales.verdict import Judgement, cause_of_range, judge
from calib.schema.scales import ExpectedError, HeadScales, Scheme, TensorScale

if TYPE_CHECKING:
    from calib.measurement.site import Site, WeightSite

__all__ = ["activation_scale", "weight_scale"]


def activation_scale(
    name: str,
    site: Site,
    method: BoundMethod,
    grid: Grid,
    *,
    per_channel: bool = False,
    limit: tuple[float, float] | None = None,
) -> TensorScale | None:
    """Scale of one site; None if all of its values are 0 or nearly so: then no scale follows from the data.

    The grid reaches no further than `limit`, its lowest and highest value, if there is one.
    """
    distribution = distribution_of(name, site, method)
    step = method.step(distribution, grid)
    if step is not None and limit is not None:
        step = grid.step(max(step.low, limit[0]), min(step.high, limit[1]))
    if step is None:
        return None
    measured = site.statistics.histogram is not None
    error = UNKNOWN
    if measured:
        error = expected_error(distribution, step.scale, step.zero_point, grid.qmin, grid.qmax)
    judgement = judge(
        error,
        lambda: dynamic_per_token_error(site, bits=grid.bits, whole=distribution),
        lambda: cause_of_range(site.statistics),
    )
    scale: float | list[float] = shortest(step.scale)
    zero_point: int | list[int] = step.zero_point
    channels = site.statistics.channels
    if per_channel and channels is not None:
        low, high = channels.minimum.min(axis=0), channels.maximum.max(axis=0)
        scales, points = grid.steps(low, high, step)
        scale, zero_point = shortest_list(scales), 0 if grid.symmetric else [int(p) for p in points]
        error = UNKNOWN
        judgement = Judgement(
            judgement.verdict,
            f"the error of scales per channel cannot be computed offline; one scale for all: {judgement.reason}",
        )
    return TensorScale(
        kind=site.kind,
        module=site.module,
        port=site.port,
        scheme=_scheme(grid, "per-channel" if isinstance(scale, list) else "per-tensor"),
        **_range(distribution, step.low, step.high),
        scale=scale,
        zero_point=zero_point,
        heads=_heads(site, grid, step),
        qmin=grid.qmin,
        qmax=grid.qmax,
        formula=grid.formula + (" of each channel" if isinstance(scale, list) else ""),
        method=method.label,
        shared_with=[alias for alias in site.aliases if alias != name],
        expected=shortest_error(error),
        verdict=judgement.verdict,
        reason=judgement.reason,
    )


def weight_scale(
    name: str, weight: WeightSite, method: BoundMethod, grid: Grid, *, per_row: bool = True
) -> TensorScale | None:
    """Scale of one weight, per output row or for all; None if all of its values are 0 or nearly so."""
    distribution = distribution_of(name, weight, method)
    step = method.step(distribution, grid)
    if step is None:
        return None
    statistics = weight.statistics
    scale: float | list[float] = shortest(step.scale)
    zero_point: int | list[int] = step.zero_point
    if per_row:
        scales, points = grid.steps(statistics.row_min, statistics.row_max, step)
        amax = np.maximum(np.abs(statistics.row_min), np.abs(statistics.row_max))
        error: ExpectedError = per_row_error(distribution, amax, scales)
        scale, zero_point = shortest_list(scales), 0 if grid.symmetric else [int(p) for p in points]
    else:
        error = expected_error(distribution, step.scale, step.zero_point, grid.qmin, grid.qmax)
    judgement = judge(error, None, lambda: _cause_of_weight(distribution))
    return TensorScale(
        kind="weight",
        module=weight.module,
        port="weight",
        scheme=_scheme(grid, "per-row" if per_row else "per-tensor"),
        **_range(distribution, step.low, step.high),
        scale=scale,
        zero_point=zero_point,
        qmin=grid.qmin,
        qmax=grid.qmax,
        formula=grid.formula + (" of each row" if per_row else ""),
        method=method.label,
        shared_with=[f"{module}:weight" for module in weight.tied],
        expected=shortest_error(error),
        verdict=judgement.verdict,
        reason=judgement.reason,
    )


def _heads(site: Site, grid: Grid, step: Step) -> HeadScales | None:
    """One grid per head; a head of zeros takes that of the whole tensor."""
    channels = site.statistics.channels
    if site.heads is None or channels is None:
        return None
    low = channels.minimum.min(axis=0).reshape(site.heads, -1).min(axis=1)
    high = channels.maximum.max(axis=0).reshape(site.heads, -1).max(axis=1)
    scales, points = grid.steps(low, high, step)
    return HeadScales(
        min=shortest_list(low),
        max=shortest_list(high),
        scale=shortest_list(scales),
        zero_point=[int(point) for point in points],
    )


def _scheme(grid: Grid, granularity: str) -> Scheme:
    return Scheme.model_validate({"bits": grid.bits, "symmetric": grid.symmetric, "granularity": granularity})


def _range(distribution: Distribution, low: float, high: float) -> dict[str, Any]:
    return {
        "min": shortest(distribution.minimum),
        "max": shortest(distribution.maximum),
        "amax": shortest(distribution.amax),
        "range_min": shortest(low),
        "range_max": shortest(high),
    }


def _cause_of_weight(distribution: Distribution) -> str:
    ratio = distribution.amax / distribution.body_limit if distribution.body_limit else 1.0
    return f"amax {distribution.amax:.4g} is {ratio:.3g}x the 0.999 quantile of |w|"
