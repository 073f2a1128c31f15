# SPDX-License-Identifier: Apache-2.0
"""The rungs of the ladder: each takes the best candidate so far, and returns the best that it finds on top of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch

from calib.cures.candidate import KEPT, Candidate
from calib.cures.linear import is_linear
from calib.cures.offline import OfflineRotation
from calib.cures.pairs import Pair
from calib.cures.prefix import find_prefixes, room_for_prefix
from calib.cures.ranges import smoothed_ranges
from calib.cures.resample import resampled
from calib.cures.rotate import OnlineRotation
from calib.cures.sweep import SmoothingSweep
from calib.cures.trials import Trial, Trials
from calib.errors import ModelError, UsageError
from calib.measurement.artifact import Measurement
from calib.measurement.head import can_skip_head, without_head
from calib.models.device import input_device
from calib.models.takes import text_inputs, writes
from calib.quantized import QuantizationPlan, QuantizedModel
from calib.quantized.hessian import collect_hessians, compensated
from calib.statistics.observation import REST

__all__ = ["RUNGS"]

_ALPHA, _STEP = 0.8, 0.1
_ALPHA_LEFT = 0.6  # where a rotated residual stream leaves only products to smooth
_ALPHA_ROTATED = 0.5  # in front of a rotation, which spreads what is left over all channels
_KEEP_SHORTLIST = 6
_HESSIAN_TOKENS = 16_384  # ten times the inputs of a layer of 1,536; error compensation takes all text up to that
_WEIGHTS_SHARE = 0.25  # of the loss, below which a better rounding of weights is not worth its while


def smooth(trials: Trials, best: Trial) -> Trial | None:
    """The best single alpha."""
    return _best_alpha(trials, best.candidate, _ALPHA) if len(trials.pairs) else None


def prefix(trials: Trials, best: Trial) -> Trial | None:
    """Smoothing again, behind each of the best prefixes; the better one."""
    if not trials.predicts:
        trials.skipped["prefix"] = "the model predicts no tokens, so nothing can be put in front"
        return None
    if writes(trials.model):
        trials.skipped["prefix"] = "its encoder reads without a cache, and in that a prefix would have to be"
        return None
    found = find_prefixes(trials.opened, trials.blocks)
    if not found:
        room = room_for_prefix(trials.opened, trials.blocks, 1)
        why = "no prefix lowers the ranges: the model has no sink that one takes"
        trials.skipped["prefix"] = (
            why if room else "blocks fill all positions of the model; a smaller --max-length leaves room"
        )
    better: Trial | None = None
    for one in found:
        start = (better or best).candidate
        base = replace(best.candidate, prefix=one, smoothing=None)
        tried = _smoothed_again(trials, base, start.alpha, best if better is None else min(best, better, key=_worth))
        better = tried if better is None else min(better, tried, key=_worth)
    return better


def resample(trials: Trials, best: Trial) -> Trial | None:
    """Ranges that also cover what the model itself would have written; smoothing again, to fit them."""
    if not trials.predicts:
        trials.skipped["resample"] = "the model predicts no tokens, so it cannot write text"
        return None
    base = replace(best.candidate, resampled=resampled(trials.opened, trials.few), smoothing=None)
    return _smoothed_again(trials, base, best.candidate.alpha, best)


def rotate(trials: Trials, best: Trial) -> Trial | None:
    """Residual stream and values in another basis, in the weights; smoothing again, of what stays as it was."""
    try:
        base = replace(best.candidate, rotation=_rotation(trials), smoothing=None)
        trials.applied(base).close()  # what cannot be rotated is said here
    except (ModelError, UsageError) as error:
        trials.skipped["rotate"] = str(error)
        return None
    alpha, stream = best.candidate.alpha, base.rotation is not None and base.rotation.stream is not None
    return _smoothed_again(trials, base, _ALPHA_LEFT if stream and alpha is not None else alpha, best)


def rotate_online(trials: Trials, best: Trial) -> Trial | None:
    """The inputs of layers behind products and non-linear functions, rotated as they arrive."""
    try:
        rotation = OnlineRotation.by_role(trials.model)
    except UsageError as error:
        trials.skipped["rotate-online"] = str(error)
        return None
    base, smoothing = best.candidate, best.candidate.smoothing

    def rotated(one: Candidate) -> Candidate:
        turned = replace(one, input_rotation=rotation)
        return replace(turned, ranges=trials.ranges(turned))

    ends = {} if smoothing is None else {p.name: _ends_in(p, rotation.modules) for p in smoothing.pairs}
    if smoothing is None or not any(ends.values()):  # no alpha changes what is rotated
        return trials.attempt(rotated(base))

    def at(alpha: float, rival: Trial | None) -> Trial:
        alphas = {name: alpha if ends[name] else a for name, a in zip(ends, smoothing.alphas, strict=True)}
        return trials.attempt(rotated(_smoothed(trials, base, alphas)), rival)

    return _walk(trials, at, _ALPHA_ROTATED)


def scale(trials: Trials, best: Trial) -> Trial | None:
    """Loud channels brought down in front of the layers that no pair ends in, as their inputs arrive."""
    scaled = best.candidate.scaled(trials.model, trials.pairs)
    if scaled is None:
        trials.skipped["scale"] = "no layer that smoothing cannot reach has loud channels"
    return None if scaled is None else trials.attempt(scaled)


def compensate(trials: Trials, best: Trial) -> Trial | None:
    """Weights rounded so that errors cancel over the inputs that were seen."""
    base, model = best.candidate, trials.model
    enough = -(-_HESSIAN_TOKENS // trials.blocks.input_ids.shape[1])
    rows = trials.blocks.select(range(min(enough, len(trials.blocks)))).with_prefix(base.prefix_ids)
    judge = trials.judge("search", base.prefix_ids)
    with trials.applied(base):
        plan = base.planned(model)
        linear = [name for name in plan.weights if is_linear(model.get_submodule(name))]
        if not linear:
            trials.skipped["compensate"] = "the model has no linear layers whose inputs can be collected"
            return None
        with QuantizedModel(model, replace(plan, inputs={})):
            lost = judge.judge().mean
        if lost <= _WEIGHTS_SHARE * best.worth:
            reason = f"rounding the weights costs {lost:.2g} of {best.worth:.2g} lost, too little"
            trials.skipped["compensate"] = reason
            return None
        with (
            torch.no_grad(),
            without_head(model) if can_skip_head(model, input_device(model)) else nullcontext(),
            collect_hessians(model, linear, skip_positions=len(base.prefix_ids)) as hessians,
        ):
            for batch in rows.batches(trials.options.batch_size):
                model(**text_inputs(model, torch.from_numpy(rows.input_ids[batch])))
        plan = compensated(plan, model, hessians, order="activation")
    return trials.attempt(replace(base, plan=plan, compensated=True))


def keep(trials: Trials, best: Trial) -> Trial | None:
    """Layer by layer into float, each time the one whose rounding costs most."""
    start = best
    with trials.applied(best.candidate):
        plan = best.candidate.planned(trials.model)
    shortlist = _loudest(best.candidate.ranges, plan, include_sink=best.candidate.prefix is None)
    for _ in range(trials.options.keep):
        tried = []
        for name in shortlist:
            if name not in best.candidate.kept:
                kept = (*best.candidate.kept, name)
                without = plan.without(dict.fromkeys(kept, KEPT))
                tried.append(trials.attempt(replace(best.candidate, plan=without, kept=kept)))
        winner = min(tried, key=_worth, default=best)
        if winner.worth >= best.worth:
            break
        best = winner
        if trials.met(best):
            break
    return None if best is start else best


RUNGS: dict[str, Callable[[Trials, Trial], Trial | None]] = {
    "smooth": smooth,
    "prefix": prefix,
    "resample": resample,
    "rotate": rotate,
    "rotate-online": rotate_online,
    "scale": scale,
    "compensate": compensate,
    "keep": keep,
}
"""By the name of the cure, in the order of the ladder: cheap ones first."""


def _worth(trial: Trial) -> float:
    return trial.worth


def _ends_in(pair: Pair, modules: Collection[str]) -> bool:
    return all(consumer.module in modules for consumer in pair.consumers)


def _rotation(trials: Trials) -> OfflineRotation:
    """Of stream and values, or of values alone."""
    try:
        return OfflineRotation.find(trials.model, trials.pairs, untie=True)
    except ModelError as error:
        trials.skipped["rotate the residual stream"] = str(error)
        return OfflineRotation.find(trials.model, trials.pairs, residual=False)


def _smoothed_again(trials: Trials, base: Candidate, alpha: float | None, rival: Trial) -> Trial:
    """Measures a candidate without smoothing; with the alpha that fits it, unless nothing was smoothed."""
    measured = trials.ranges(base)
    base = replace(base, measurement=measured, ranges=measured)
    if alpha is None or not _pairs_left(trials, base):
        return trials.attempt(base, rival)
    return _best_alpha(trials, base, alpha, rival)


def _pairs_left(trials: Trials, base: Candidate) -> list[Pair]:
    """What a rotation leaves to smooth: where channels are mixed, none is larger than the others."""
    return [pair for pair in trials.pairs if base.rotation is None or not base.rotation.mixes(pair)]


def _best_alpha(trials: Trials, base: Candidate, start: float, rival: Trial | None = None) -> Trial:
    """The best single alpha near the start."""
    return _walk(trials, lambda alpha, other: trials.attempt(_smoothed(trials, base, alpha), other), start, rival)


def _walk(
    trials: Trials, at: Callable[[float, Trial | None], Trial], start: float, rival: Trial | None = None
) -> Trial:
    """Walks from an alpha in the direction that helps, up or else down, as long as it does and the target is missed.

    Where the start is clearly worse than the rival, its neighbours are not tried.

    Args:
        trials: says whether the target is met.
        at: tries an alpha against a rival.
        start: the first alpha.
        rival: of the start.
    """
    best, reached = at(start, rival), start
    for step in (_STEP, -_STEP):
        alpha = round(start + step, 3)
        while 0 <= alpha <= 1 and not best.given_up and not trials.met(best):
            tried = at(alpha, best)
            if tried.worth >= best.worth:
                break
            best, reached, alpha = tried, alpha, round(alpha + step, 3)
        if reached != start:
            break
    return best


def _smoothed(trials: Trials, base: Candidate, alpha: float | Mapping[str, float]) -> Candidate:
    """Ranges after smoothing follow from those before: nothing is measured."""
    sweep = SmoothingSweep(_pairs_left(trials, base), base.measurement, include_sink=base.prefix is None)
    smoothing = sweep.smoothing(alpha)
    return replace(base, smoothing=smoothing, ranges=smoothed_ranges(base.measurement, smoothing))


def _loudest(ranges: Measurement, plan: QuantizationPlan, *, include_sink: bool) -> list[str]:
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
    return sorted(ratio, key=lambda n: -ratio[n])[:_KEEP_SHORTLIST]
