# SPDX-License-Identifier: Apache-2.0
"""Expected error: what a grid does to a tensor, from its distribution alone.

The quantizer, everywhere in calib: ``q = clip(rint(x / scale) + zero_point, qmin, qmax)``, ties to even, and
``Q(x) = (q - zero_point) * scale``. With u = |x| / scale and n = min(rint(u), limit), `limit` being the grid's last
level on that side of zero, the error is |u - n| steps. For values uniform on an interval its mean follows from

    F(u) = integral of (v - n)^2 from 0 to u = n / 12 + f^3 / 3        with f = u - n
    G(u) = integral of |v - n|   from 0 to u = n / 4  + sign(f) f^2 / 2

in which n stops growing at the limit, so that saturation needs no case of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calib.scales.distribution import Distribution
from calib.scales.magnitudes import Floats, Magnitudes
from calib.schema.scales import ExpectedError

__all__ = ["UNKNOWN", "ErrorSums", "expected_error", "saturation_slack", "side_errors", "sides", "square_error"]

UNKNOWN = ExpectedError(sqnr_db=None, body_sqnr_db=None, rel_mae=None, clipped=None, zeroed=None)
"""Nothing can be said offline."""


@dataclass(frozen=True)
class ErrorSums:
    """Sums over values, which add up over sides, groups and weights.

    Attributes:
        body: sum of squared errors over the body.
        peak: the same over the peak.
        absolute: sum of absolute errors.
        clipped: number of values beyond the grid.
        zeroed: number of values that are not 0 and become 0.
    """

    body: float = 0.0
    peak: float = 0.0
    absolute: float = 0.0
    clipped: float = 0.0
    zeroed: float = 0.0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.body + other.body,
            self.peak + other.peak,
            self.absolute + other.absolute,
            self.clipped + other.clipped,
            self.zeroed + other.zeroed,
        )

    def times(self, weight: float) -> ErrorSums:
        """All sums with a weight."""
        return ErrorSums(
            self.body * weight,
            self.peak * weight,
            self.absolute * weight,
            self.clipped * weight,
            self.zeroed * weight,
        )

    def of(self, distribution: Distribution, *, estimated: bool = False) -> ExpectedError:
        """As shares of what the distribution holds."""
        side = distribution.folded
        body_energy = float(side.squares_below[distribution.body_size(side)])
        peak_energy = float(side.squares_below[-1]) - body_energy
        magnitude, count = float(side.sums_below[-1]), max(distribution.count, 1)
        return ExpectedError(
            sqnr_db=decibels(distribution.energy, self.body + self.peak),
            body_sqnr_db=decibels(body_energy, self.body),
            peak_sqnr_db=decibels(peak_energy, self.peak),
            rel_mae=self.absolute / magnitude if magnitude > 0 else 0.0,
            clipped=min(max(self.clipped / count, 0.0), 1.0),
            zeroed=min(max(self.zeroed / count, 0.0), 1.0),
            estimated=estimated,
        )


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there is no noise, or no signal that it could be compared with."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def saturation_slack(qmin: int, qmax: int) -> float:
    """By how many steps a value may lie beyond the last level of a grid without counting as clipped.

    The ends of a narrow symmetric grid are the ends of the range, so only rounding of the scale is forgiven. Any
    other grid is shifted against its range by rounding the zero point, or ends half a step before it (amax/127.5):
    values up to half a step beyond its last level are reconstructed no worse than any other.
    """
    rounding = (qmax - qmin) * 2.0**-22  # scale is float32: relative 2^-24 of the range
    return rounding if qmin == -qmax else 0.5 + rounding


def sides(distribution: Distribution, zero_point: int, qmin: int, qmax: int) -> list[tuple[Magnitudes, int]]:
    """The sides of a distribution, each with the last level of the grid there; one if both saturate alike."""
    above, below = qmax - zero_point, zero_point - qmin
    if above == below:
        return [(distribution.folded, above)]
    return [(distribution.positive, above), (distribution.negative, below)]


def expected_error(
    distribution: Distribution, scale: float, zero_point: int = 0, qmin: int = -127, qmax: int = 127
) -> ExpectedError:
    """Error of a uniform grid on a tensor: exact for bfloat16 data, else as good as its values are uniform in bins.

    Args:
        distribution: of the tensor.
        scale: step of the grid, in units of the tensor.
        zero_point: level that stands for 0.
        qmin: first level.
        qmax: last level.
    """
    slack = saturation_slack(qmin, qmax)
    total = ErrorSums()
    for side, limit in sides(distribution, zero_point, qmin, qmax):
        total += side_errors(side, scale, limit, body=distribution.body_size(side), slack=slack)
    return total.of(distribution)


def side_errors(
    side: Magnitudes, scale: float, limit: float, *, body: int, slack: float = 0.0, stop: int | None = None
) -> ErrorSums:
    """Error sums of one side.

    Args:
        side: magnitudes on one side of zero, or folded.
        scale: step.
        limit: last level of the grid on this side; infinity if it never saturates.
        body: how many entries belong to the body.
        slack: steps beyond the last level that do not count as clipped.
        stop: entries from this one on are left out.
    """
    stop = side.value.size if stop is None else stop
    # up to half a step, and everywhere if there is no level beside zero, all is lost: those sums are at hand
    lost = side.top if limit == 0 else scale / 2
    start = min(int(np.searchsorted(side.high, lost, side="right")), stop)
    squares, absolutes = _mean_errors(side, slice(start, stop), scale, limit)
    count = side.count[start:stop]
    split = min(max(body - start, 0), stop - start)
    body_part = float(np.dot(count[:split], squares[:split]))
    peak_part = float(np.dot(count[split:], squares[split:]))
    inner = min(body, start)
    clipped = side.total - side.count_below((limit + slack) * scale) if math.isfinite(limit) else 0.0
    return ErrorSums(
        body=float(side.squares_below[inner]) + body_part,
        peak=float(side.squares_below[start] - side.squares_below[inner]) + peak_part,
        absolute=float(side.sums_below[start]) + float(np.dot(count, absolutes)),
        clipped=clipped,
        zeroed=min(side.count_below(lost), float(side.counts_below[stop])),
    )


def square_error(side: Magnitudes, scale: float, limit: int) -> float:
    """Sum of squared errors of one side, the objective of a search: saturated values by running sums, too."""
    start = int(np.searchsorted(side.high, scale / 2, side="right")) if limit else side.value.size
    end = scale * limit
    stop = max(start, int(np.searchsorted(side.low, end, side="right"))) if limit else start
    squares, _ = _mean_errors(side, slice(start, stop), scale, limit, absolute=False)
    number, first, second = side.moments_above
    saturated = second[stop] - 2 * end * first[stop] + end * end * number[stop]
    return float(side.squares_below[start]) + float(np.dot(side.count[start:stop], squares)) + float(saturated)


def _mean_errors(
    side: Magnitudes, window: slice, scale: float, limit: float, *, absolute: bool = True
) -> tuple[Floats, Floats]:
    """Mean squared and mean absolute error of each entry in a window."""
    low = side.low[window]
    if side.exact:
        # scale has 24 bits and levels at most 16: the product is exact, so the difference is rounded once
        error = low - np.minimum(np.rint(low / scale), limit) * scale
        return error * error, np.abs(error) if absolute else error
    lower, upper = low / scale, side.high[window] / scale
    width = upper - lower
    level_low, level_high = np.minimum(np.rint(lower), limit), np.minimum(np.rint(upper), limit)
    from_low, from_high = lower - level_low, upper - level_high
    square_low, square_high = from_low * from_low, from_high * from_high
    steps = level_high - level_low
    cubes = square_high * from_high - square_low * from_low
    squares = (steps / 12 + cubes / 3) * (scale * scale / width)
    if not absolute:
        return squares, squares
    halves = np.copysign(square_high, from_high) - np.copysign(square_low, from_low)
    return squares, (steps / 4 + halves / 2) * (scale / width)
