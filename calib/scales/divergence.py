# SPDX-License-Identifier: Apache-2.0
"""KL divergence between the histogram of a tensor and its quantized version, in the spirit of TensorRT's calibration.

TensorRT compares 2,048 linear bins over [0, amax]. In a tensor with massive activations nearly all values fall in the
first of them, and the result says more about the bins than about the tensor. Here the bins are those of the
histogram, fine where values are small. Precisely, for one grid, zero left out (every grid represents it exactly):

* *P*: the counts of all bins inside the grid's cells; what lies beyond is added to the last bin inside, on each side
  of zero. Within half a step of zero the bins are joined to 8 of width scale / 16.
* *Q*: each level's total, spread over the bins of its cell that are not empty, in proportion to their width. The two
  sides of zero are apart. What lies beyond the grid is not in Q.
* Both are normalised; the result is sum P log(P / Q), in nats.

Levels above the 128th hold one or two bins, in which hardly anything can be lost: Q is taken equal to P there.
"""

from __future__ import annotations

import math

import numpy as np

from calib.scales.distribution import Distribution
from calib.scales.error import sides
from calib.scales.magnitudes import Floats, Magnitudes

__all__ = ["divergences", "kl_divergence"]

_FINE = 16  # joined bins per step; 8 of them up to half a step
_LEVELS = 128  # bfloat16 numbers of 128 steps and more are at least half a step apart


def kl_divergence(
    distribution: Distribution, scale: float, zero_point: int = 0, qmin: int = -127, qmax: int = 127
) -> float:
    """Divergence for one grid, in nats; infinite if the grid holds none of the values on one side of zero."""
    parts = [(side, np.array([float(limit)])) for side, limit in sides(distribution, zero_point, qmin, qmax)]
    return float(divergences(parts, np.array([scale]))[0])


def divergences(parts: list[tuple[Magnitudes, Floats]], scales: Floats) -> Floats:
    """Divergences for many grids at once.

    Args:
        parts: each side of the distribution with the last level there, float64 ``[grids]``.
        scales: float64 ``[grids]``.

    Returns:
        float64 ``[grids]``, in nats.
    """
    total, inside, everything = np.zeros(scales.size), np.zeros(scales.size), 0.0
    for side, limits in parts:
        if side.value.size:
            terms, held = _side_terms(side, scales, limits)
            total += terms
            inside += held
            everything += side.total
    if everything == 0:
        return total
    with np.errstate(divide="ignore", invalid="ignore"):
        result = total / everything + np.log(inside / everything)
    # rounding leaves tiny negative numbers where P equals Q
    return np.where(inside > 0, np.maximum(result, 0.0), math.inf)


def _side_terms(side: Magnitudes, scales: Floats, limits: Floats) -> tuple[Floats, Floats]:
    """Sum of c log(c / q) over the bins of one side, and how many values lie inside the grid."""
    value, counts, shape = side.value, side.counts_below, side.entropies_below

    # bins up to each cell edge; cells past the last level are empty
    levels = np.arange(min(_LEVELS, int(limits.max())) + 1) + 0.5
    edges = np.minimum(levels, limits[:, None] + 0.5) * scales[:, None]
    upto = np.searchsorted(value, edges, side="right")
    fine = np.searchsorted(value, np.arange(1, _FINE // 2 + 1) / _FINE * scales[:, None], side="right")

    mass, width = np.diff(counts[upto], axis=1), np.diff(side.widths_below[upto], axis=1)
    density = mass / np.maximum(width, 1e-300)
    terms = shape[upto[:, -1]] - shape[upto[:, 0]] - _xlogx(mass, density).sum(axis=1)

    joined = np.diff(counts[fine], axis=1, prepend=0.0)
    centre, filled = joined.sum(axis=1), np.count_nonzero(joined, axis=1)
    terms += _xlogx(joined, joined).sum(axis=1) - _xlogx(centre, centre / np.maximum(filled, 1))

    end = np.searchsorted(value, (limits + 0.5) * scales, side="right")
    held = counts[end]
    beyond = side.total - held
    last = np.maximum(end - 1, 0)
    level = np.ceil(value[last] / scales - 0.5)  # ties down, as `searchsorted` puts them
    # of the last bin: its count and what Q gives it
    in_centre, alone = level < 0.5, level > levels.size - 1
    # a grid far below all values holds no bin, and the level of the nearest one exceeds any integer: clip it first
    slot = np.clip(level - 1, 0, max(mass.shape[1] - 1, 0)).astype(np.int64)[:, None]
    there = side.count[last]
    given = there.copy()
    if mass.shape[1]:
        cell = np.take_along_axis(density, slot, axis=1)[:, 0]
        given = np.where(alone, there, cell * side.width[last])
    final = joined[:, ::-1][np.arange(scales.size), np.argmax(joined[:, ::-1] > 0, axis=1)]
    there = np.where(in_centre, final, there)
    given = np.where(in_centre, centre / np.maximum(filled, 1), given)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = _xlogx(there + beyond, (there + beyond) / given) - _xlogx(there, there / given)
    unreachable = (beyond > 0) & (held == 0)
    return terms + np.where(unreachable, math.inf, np.where(beyond > 0, change, 0.0)), held


def _xlogx(x: Floats, ratio: Floats) -> Floats:
    """X log(ratio), 0 where x is 0."""
    return x * np.log(np.where(x > 0, ratio, 1.0))
