# SPDX-License-Identifier: Apache-2.0
"""Expected error of scales that vary: one per token (dynamic) or one per row (weights).

The histogram does not say which value belongs to which token. The model: a value is independent of its token's largest
magnitude a, given that |x| <= a. Tokens are summarised by at most 8 groups of about equal scale. With shares w_j,
largest magnitudes u_j and H(u) the share of all values up to u, a value of magnitude x belongs to group j with
probability proportional to w_j / H(u_j) if x <= u_j, else 0. So every value keeps its place in the tensor's
distribution, the energy is exact, and only the pairing of values with scales is modelled. The largest value of each
token is the end of its grid and has no error: those values are known, and taken out first. The same model serves the
rows of a weight.
Sink positions and all others are modelled apart, because both their values and their scales differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calib.scales.distribution import Distribution
from calib.scales.error import UNKNOWN, ErrorSums, side_errors
from calib.scales.grid import Grid
from calib.scales.magnitudes import Floats, Magnitudes
from calib.schema.scales import ExpectedError
from calib.statistics.histogram import FloatHistogram, bfloat16_bins, bin_values
from calib.statistics.observation import GROUPS
from calib.statistics.site import SiteStatistics

__all__ = ["dynamic_per_token_error", "per_row_error"]

_GROUPS = 8
_FINEST = 0.25  # octaves of scale per group; noise grows with the square, so a group blurs it by at most 2^(2 * 0.25)


@dataclass(frozen=True, eq=False)
class _ScaleGroups:
    """Tokens or rows of about equal scale.

    Attributes:
        scale: float64 ``[k]``, root mean square of the scales, which keeps the mean noise.
        largest: float64 ``[k]``, largest magnitude in the group, ascending.
        share: float64 ``[k]``, how many tokens it holds.
        maxima: float64 ``[n]``, the largest magnitudes one by one, ascending.
        counts: float64 ``[n]``, how many tokens have each.
    """

    scale: Floats
    largest: Floats
    share: Floats
    maxima: Floats
    counts: Floats

    @classmethod
    def of(cls, amax: Floats, scale: Floats, count: Floats) -> _ScaleGroups:
        """From magnitudes ``[n]`` ascending, their scales and how many tokens have them."""
        octaves = np.log2(amax / amax[0])
        cell = np.floor(octaves / max(_FINEST, octaves[-1] / _GROUPS * (1 + 1e-9)))
        ends = np.append(np.flatnonzero(np.diff(cell)) + 1, amax.size)
        starts = np.concatenate([[0], ends[:-1]])
        share = np.add.reduceat(count, starts)
        squares = np.add.reduceat(count * scale * scale, starts)
        return cls(np.sqrt(squares / share), amax[ends - 1], share, amax, count)


def _modelled(distribution: Distribution, groups: _ScaleGroups) -> ErrorSums:
    side = distribution.folded
    if not side.value.size:
        return ErrorSums()
    stops = np.searchsorted(side.value, groups.largest, side="right")
    stops[-1] = side.value.size
    held = (side.counts_below[stops] + distribution.zeros) / max(distribution.count, 1)
    weight = groups.share / np.maximum(held, 1e-300)
    # a value takes part in every group that reaches up to it; its parts add up to one
    first = np.searchsorted(stops, np.arange(side.value.size), side="right")
    weights_from = np.cumsum(weight[::-1])[::-1]
    parts = side.weighted(_without_maxima(side, groups) / weights_from[first])
    body, total = distribution.body_size(side), ErrorSums()
    for scale, stop, share in zip(groups.scale, stops, weight, strict=True):
        # each token's scale holds its largest value: nothing saturates
        total += side_errors(parts, float(scale), math.inf, body=body, stop=int(stop)).times(float(share))
    return total


def _without_maxima(side: Magnitudes, groups: _ScaleGroups) -> Floats:
    count = side.count.copy()
    np.subtract.at(count, np.searchsorted(side.value, groups.maxima, side="right") - 1, groups.counts)
    if count.size > 1 and count[-1] < 0:
        count[-2] += count[-1]  # the very largest value of float32 data has an entry of its own beside its bin
    return np.maximum(count, 0.0)


class Measured(Protocol):
    """What is needed of a site."""

    @property
    def dtype(self) -> str:
        """Of the tensor."""

    @property
    def statistics(self) -> SiteStatistics:
        """Of all its values."""


def dynamic_per_token_error(site: Measured, *, bits: int = 8, whole: Distribution | None = None) -> ExpectedError:
    """Error of a symmetric grid whose scale is each token's amax / qmax, as a consumer computes it at run time.

    Args:
        site: without a histogram or token maxima nothing is known about it.
        bits: of the grid.
        whole: the distribution of the site, where it is at hand.
    """
    statistics, dtype = site.statistics, site.dtype
    if statistics.histogram is None or statistics.tokens is None:
        return UNKNOWN
    whole = whole or Distribution.of(statistics.histogram, statistics.range, dtype)
    qmax, total = Grid(bits).qmax, ErrorSums()
    for group in range(GROUPS):
        amax, count = _token_amax(statistics.tokens, group)
        if amax.size:
            part = Distribution.of(statistics.histogram, statistics.range, dtype, group=group, whole=whole)
            total += _modelled(part, _ScaleGroups.of(amax, amax / qmax, count))
    return total.of(whole, estimated=True)


def _token_amax(tokens: FloatHistogram, group: int) -> tuple[Floats, Floats]:
    values, counts, _, _ = tokens.combined(group)
    some = values > 0  # a token of zeros has no error
    return values[some], counts[some].astype(np.float64)


def per_row_error(distribution: Distribution, amax: NDArray[np.float32], scale: NDArray[np.float32]) -> ExpectedError:
    """Error of a weight with a scale per row.

    Args:
        distribution: of the whole weight.
        amax: float32 ``[rows]``, largest magnitude of each row.
        scale: float32 ``[rows]``.
    """
    # in bins of the histogram, as the maxima of tokens are
    bins = bin_values(bfloat16_bins(amax))
    order = np.argsort(bins, kind="stable")
    order = order[bins[order] > 0]
    if not order.size:
        return ErrorSums().of(distribution, estimated=True)
    groups = _ScaleGroups.of(bins[order], scale[order].astype(np.float64), np.ones(order.size))
    return _modelled(distribution, groups).of(distribution, estimated=True)
