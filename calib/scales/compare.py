# SPDX-License-Identifier: Apache-2.0
"""`compare_methods`: what each method would do to the tensors of a measurement, as rows of figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from calib.scales.error import expected_error
from calib.scales.float8 import float8_error
from calib.scales.grid import Grid
from calib.scales.methods import BoundMethod, parse_method
from calib.scales.selected import distribution_of, is_quantized, select
from calib.scales.varying import dynamic_per_token_error
from calib.scales.verdict import too_coarse
from calib.schema.scales import ExpectedError

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.measurement.site import Site

__all__ = ["MethodRow", "compare_methods"]


@dataclass(frozen=True)
class MethodRow:
    """One method over all tensors. Figures in dB are None where no tensor has an error to state.

    Attributes:
        label: method with its parameter, "dynamic per-token" or "float8 e4m3".
        tensors: how many tensors the figures are over.
        too_coarse: for how many of them the grid is too coarse (see `calib.scales.verdict`).
        estimated: a model stands in for the histogram.
        median_sqnr_db: over tensors; likewise below. `worst` is the lowest SQNR, the highest of the others.
        worst_tensor: the tensor with the lowest body SQNR.
        errors: the error of each tensor by name.
    """

    label: str
    tensors: int
    too_coarse: int
    estimated: bool
    median_sqnr_db: float | None
    worst_sqnr_db: float | None
    median_body_sqnr_db: float | None
    worst_body_sqnr_db: float | None
    median_rel_mae: float
    worst_rel_mae: float
    median_zeroed: float
    worst_zeroed: float
    median_clipped: float
    worst_clipped: float
    worst_tensor: str
    errors: dict[str, ExpectedError] = field(repr=False)


def compare_methods(
    measurement: Measurement,
    methods: Sequence[str],
    bits: int = 8,
    symmetric: bool = True,
    *,
    sites: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
) -> list[MethodRow]:
    """Rows for each method, for a dynamic scale per token, and for FP8 E4M3, over what a deployment quantizes.

    Only activations are compared; if none of the measured ones is quantized by a deployment, all are. Tensors whose
    values are all 0 are left out. The row of dynamic scales is missing where token maxima were not measured.

    Raises:
        UsageError: bits, a method or a pattern is invalid.
        ArtifactError: only ranges were measured.
        GateError: a tensor held NaN or infinite values, or was never reached.
    """
    grid, bound = Grid(bits, symmetric), [parse_method(text) for text in dict.fromkeys(methods)]
    selected = select(measurement, sites, ignore).sites
    quantized = {name: site for name, site in selected.items() if is_quantized(site)} or selected
    errors: dict[str, dict[str, ExpectedError]] = {}
    for name, site in quantized.items():
        for label, error in _errors(name, site, bound, grid).items():
            errors.setdefault(label, {})[name] = error
    return [_row(label, of_tensors) for label, of_tensors in errors.items()]


def _errors(name: str, site: Site, methods: list[BoundMethod], grid: Grid) -> dict[str, ExpectedError]:
    # every row needs the histogram, even that of absmax
    distribution = distribution_of(name, site, parse_method("mse"))
    result = {}
    for method in methods:
        step = method.step(distribution, grid)
        if step is None:
            return {}
        result[method.label] = expected_error(distribution, step.scale, step.zero_point, grid.qmin, grid.qmax)
    dynamic = dynamic_per_token_error(site, bits=grid.bits, whole=distribution)
    if dynamic.rel_mae is not None:
        result["dynamic per-token"] = dynamic
    result["float8 e4m3"] = float8_error(distribution)
    return result


def _row(label: str, errors: dict[str, ExpectedError]) -> MethodRow:
    def figures(of: Callable[[ExpectedError], float | None]) -> list[float]:
        # no SQNR means no error: better than any
        return [math.inf if (figure := of(error)) is None else figure for error in errors.values()]

    def decibels(value: float) -> float | None:
        return value if math.isfinite(value) else None

    sqnr, body = figures(lambda e: e.sqnr_db), figures(lambda e: e.body_sqnr_db)
    lost, zeroed = figures(lambda e: e.rel_mae), figures(lambda e: e.zeroed)
    clipped = figures(lambda e: e.clipped)
    names = list(errors)
    return MethodRow(
        label=label,
        tensors=len(errors),
        too_coarse=sum(too_coarse(error) is not None for error in errors.values()),
        estimated=any(error.estimated for error in errors.values()),
        median_sqnr_db=decibels(median(sqnr)),
        worst_sqnr_db=decibels(min(sqnr)),
        median_body_sqnr_db=decibels(median(body)),
        worst_body_sqnr_db=decibels(min(body)),
        median_rel_mae=median(lost),
        worst_rel_mae=max(lost),
        median_zeroed=median(zeroed),
        worst_zeroed=max(zeroed),
        median_clipped=median(clipped),
        worst_clipped=max(clipped),
        worst_tensor=names[body.index(min(body))],
        errors=errors,
    )
