# SPDX-License-Identifier: Apache-2.0
"""Verdict: whether a tensor can take a static scale, needs one per token, or should stay in floating point, and why.

A grid is *too coarse* for a tensor if the bulk of its values is lost, whatever the overall SQNR says, for a few peaks
can hold all of the energy; or if it ends below the peaks. Five limits, each with its reason:

* body SQNR < 10 dB: rounding noise is s^2 / 12, so at 10 dB the body's root mean square is 0.91 steps: most of the body
  falls on the levels -1, 0 and 1.
* SQNR < 10 dB over all values: a tenth of the energy is lost. With a good body this means that peaks are clipped, and
  models need their massive activations: setting a few of them to 0 breaks them (arXiv 2402.17762).
* relative MAE > 0.5: more than half of sum |x| is lost. Where everything but the peaks becomes 0 it is near 1.
* more than half of the values become 0 *and* relative MAE > 0.25. The second condition is needed: in the product inside
  a gated MLP most values are tiny, more than half may vanish, and what they carry is a few percent of sum |x|.
* more than 80 % of the values become 0, whatever they carry: where a channel is large for all tokens, as in keys with
  a bias, more than one value in a thousand is a peak, and then energy, sum |x| and even the body lie in that channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from calib.schema.scales import ExpectedError, Verdict
from calib.statistics.observation import REST, SINK
from calib.statistics.site import SiteStatistics

__all__ = ["Judgement", "cause_of_range", "judge", "judge_model", "too_coarse"]

SMALLEST_SQNR_DB = 10.0
LARGEST_REL_MAE = 0.5
LARGEST_ZEROED = 0.5
ZEROED_REL_MAE = 0.25
NEARLY_ALL_ZEROED = 0.8
_FAR = 4.0  # a range this many times another is worth naming as the cause: it costs two bits

_ORDER: tuple[Verdict, ...] = ("static", "dynamic-per-token", "float")


@dataclass(frozen=True)
class Judgement:
    """A verdict and its reason in words."""

    verdict: Verdict
    reason: str


def too_coarse(error: ExpectedError) -> str | None:
    """What is wrong with an error, in words; None if nothing is. An error that is 0 has no SQNR."""
    if error.rel_mae is None or error.zeroed is None:
        return None
    body = math.inf if error.body_sqnr_db is None else error.body_sqnr_db
    sqnr = math.inf if error.sqnr_db is None else error.sqnr_db
    lost, zeroed = error.rel_mae, error.zeroed
    faults = (
        (body < SMALLEST_SQNR_DB, f"body SQNR {body:.1f} dB"),
        (sqnr < SMALLEST_SQNR_DB, f"SQNR {sqnr:.1f} dB, {error.clipped or 0:.2%} of the values are clipped"),
        (lost > LARGEST_REL_MAE, f"relative MAE {lost:.2f}"),
        (
            zeroed > LARGEST_ZEROED and lost > ZEROED_REL_MAE,
            f"{zeroed:.0%} of the values become 0 and relative MAE is {lost:.2f}",
        ),
        (zeroed > NEARLY_ALL_ZEROED, f"{zeroed:.1%} of the values become 0"),
    )
    return next((words for holds, words in faults if holds), None)


def judge(static: ExpectedError, dynamic: Callable[[], ExpectedError] | None, cause: Callable[[], str]) -> Judgement:
    """Verdict on one tensor.

    Args:
        static: error of the static scale.
        dynamic: error of a scale per token, asked for only if needed; None if the tensor has no tokens (a weight).
        cause: why the range is what it is, asked for only if needed.
    """
    if static.rel_mae is None:
        return Judgement("static", "no histogram was measured: the error of this scale is unknown")
    fault = too_coarse(static)
    if fault is None:
        body = "no rounding error" if static.body_sqnr_db is None else f"body SQNR {static.body_sqnr_db:.1f} dB"
        return Judgement("static", body)
    why = f"static: {fault}; {cause()}"
    if dynamic is None:
        return Judgement("float", why)
    per_token = dynamic()
    if per_token.rel_mae is None:
        return Judgement("float", f"{why}; per-token maxima were not measured")
    still = too_coarse(per_token)
    if still is not None:
        return Judgement("float", f"{why}; dynamic per-token: {still}")
    better = "" if per_token.body_sqnr_db is None else f"; dynamic per-token: body SQNR {per_token.body_sqnr_db:.1f} dB"
    return Judgement("dynamic-per-token", why + better)


def judge_model(tensors: Iterable[tuple[str, Judgement]]) -> Judgement:
    """Verdict on a model: that of its worst tensor, with how many share it.

    Args:
        tensors: name and judgement of each tensor that a deployment quantizes.
    """
    judged = list(tensors)
    if not judged:
        return Judgement("float", "no tensor that a deployment quantizes was measured")
    worst = max((j.verdict for _, j in judged), key=_ORDER.index)
    of_worst = [(name, j) for name, j in judged if j.verdict == worst]
    if worst == "static":
        return Judgement("static", f"all {len(judged)} tensors that a deployment quantizes can take a static scale")
    counts = ", ".join(
        f"{n} {'should stay in float' if v == 'float' else 'need a scale per token'}"
        for v in ("float", "dynamic-per-token")
        if (n := sum(j.verdict == v for _, j in judged))
    )
    name, judgement = of_worst[0]
    return Judgement(worst, f"of {len(judged)} tensors {counts}; e.g. {name}: {judgement.reason}")


def cause_of_range(statistics: SiteStatistics) -> str:
    """Why the range of a site is as wide as it is, in words: sink positions, a channel, or a heavy tail."""
    extent = statistics.range
    rest, sink = extent.of(REST).amax, extent.of(SINK).amax
    if rest > 0 and sink > _FAR * rest:
        return f"peak at sink positions {sink:.4g} against {rest:.4g} elsewhere: {sink / rest:.3g}x"
    if statistics.channels is not None:
        channels = statistics.channels.amax
        widest, median = int(np.argmax(channels)), float(np.median(channels))
        if median > 0 and channels[widest] > _FAR * median:
            ratio = channels[widest] / median
            return f"channel {widest} reaches {channels[widest]:.4g}, the median channel {median:.4g}: {ratio:.3g}x"
    if statistics.histogram is not None and extent.count_all:
        limit = statistics.histogram.quantile_abs(0.999)
        if limit > 0:
            return f"amax {extent.amax:.4g} is {extent.amax / limit:.3g}x the 0.999 quantile of |x|"
    return f"amax {extent.amax:.4g}"
