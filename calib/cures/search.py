# SPDX-License-Identifier: Apache-2.0
"""`find_cure`: the cheapest set of cures that meets a target, found by what comes out of the quantized model.

A ladder is climbed, cheap cures first: nothing; smoothing; smoothing behind a prefix; ranges from more text; an alpha
for each role; a rotation in front of layers that nothing else can rotate; loud channels brought down in front of layers
that smoothing cannot reach; error-compensated weights; layers left in float. Each rung keeps what the last one found.
The search looks at one part of the held-out blocks; the ablation table comes from another part, which no decision has
seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from calib.corpus import TokenBlocks
from calib.cures.candidate import KEPT, Candidate, names_by_role
from calib.cures.find import find_pairs
from calib.cures.judge import Judge, Score
from calib.cures.linear import is_linear
from calib.cures.loudest import loudest
from calib.cures.pairs import Pairs
from calib.cures.prefix import find_prefixes
from calib.cures.ranges import smoothed_ranges
from calib.cures.resample import resampled
from calib.cures.result import Cured, CureOptions, Row
from calib.cures.rotate import OnlineRotation
from calib.cures.sweep import SmoothingSweep
from calib.errors import UsageError
from calib.evaluation.interval import Interval
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.measurement.head import can_skip_head, without_head
from calib.models import OpenedModel
from calib.models.device import input_device
from calib.quantized import QuantizedModel
from calib.quantized.hessian import collect_hessians, compensated
from calib.scales import choose_scales

__all__ = ["find_cure"]

_ALPHA, _STEP = 0.7, 0.1
_SEARCH_SHARE = 0.4  # of the held-out blocks; the others verify
_SEARCH_ROWS = 16  # blocks behind each prefix or rotation while searching; the chosen one is measured on all
_HESSIAN_TOKENS = 16_384  # ten times the inputs of a layer of 1,536; error compensation takes all text up to that
_WEIGHTS_SHARE = 0.25  # of the loss, below which a better rounding of weights is not worth its while
_JUDGES_HELD = 3
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class _State:
    """A candidate and what it is worth on the search blocks; not all of them, if it was given up."""

    candidate: Candidate
    score: Score
    worths: NDArray[np.float64]
    ratio: Interval | None
    given_up: bool = False

    @property
    def worth(self) -> float:
        """Mean over blocks, lower is better."""
        return math.inf if self.given_up else float(self.worths.mean())


def find_cure(
    opened: OpenedModel,
    measurement: Measurement,
    blocks: TokenBlocks,
    held_out: TokenBlocks,
    options: CureOptions | None = None,
    *,
    say: Say = lambda line: None,
) -> Cured:
    """Finds cures, applies them to the model in place, and measures it anew.

    Args:
        opened: the float model; on return it carries the cures (not if an error is raised).
        measurement: of this model on `blocks`, with full statistics.
        blocks: for ranges.
        held_out: for decisions (the first 40 %) and the table (the others); disjoint from `blocks`.
        options: what may be done.
        say: called with a line about each step.

    Raises:
        UsageError: an option is unknown, or there are fewer than two held-out blocks.
        ModelError: nothing of the model can be quantized.
    """
    if len(held_out) < 2:
        raise UsageError(f"cures: {len(held_out)} held-out blocks; give two or more, one to search and one to verify")
    return _Search(opened, measurement, blocks, held_out, options or CureOptions(), say).run()


class _Search:
    def __init__(
        self,
        opened: OpenedModel,
        measurement: Measurement,
        blocks: TokenBlocks,
        held_out: TokenBlocks,
        options: CureOptions,
        say: Say,
    ) -> None:
        self.opened, self.model, self.options, self.say = opened, opened.model, options, say
        self.blocks, self.measurement = blocks, measurement
        self.few = blocks.select(range(min(_SEARCH_ROWS, len(blocks))))
        cut = max(1, round(_SEARCH_SHARE * len(held_out)))
        self.held_out = {"search": held_out.select(range(cut)), "verify": held_out.select(range(cut, len(held_out)))}
        self.judges: dict[tuple[str, tuple[int, ...]], Judge] = {}
        self.pairs = Pairs((), {})
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.begin = time.perf_counter()

    def run(self) -> Cured:
        """Climbs the ladder until the target is met."""
        options, measured = self.options, self.measurement
        plain = Candidate(options.bits, options.symmetric, measured, measured, options.weight_granularity)
        state = self._try(plain)
        self._note(state)
        rungs: dict[str, Callable[[_State], list[_State]]] = {
            "smooth": self._smooth,
            "prefix": self._prefix,
            "resample": self._resample,
            "roles": self._roles,
            "rotate": self._rotate,
            "scale": self._scale,
            "compensate": self._compensate,
            "keep": self._keep,
        }
        allowed = {*self.options.cures, *(["roles"] if "smooth" in self.options.cures else [])}
        for name, rung in rungs.items():
            if name not in allowed or self._met(state):
                continue
            tried = rung(state)
            for one in tried:
                self._note(one)
            state = min([state, *tried], key=lambda one: one.worth)
        return self._apply(state)

    def _judge(self, part: str, ids: tuple[int, ...]) -> Judge:
        """The judge of a prefix; made only while the model is in its original state."""
        key = (part, ids)
        found = self.judges.pop(key, None)
        while len(self.judges) >= _JUDGES_HELD:  # each holds the outputs of the float model; the latest are kept
            self.judges.pop(next(iter(self.judges)))
        if found is None:
            found = Judge(self.model, self.held_out[part], prefix=ids, batch_size=self.options.batch_size)
        self.judges[key] = found
        return found

    def _try(self, candidate: Candidate, rival: _State | None = None) -> _State:
        """Judges a candidate on the search blocks, and gives it up once it is clearly worse than a rival."""
        judge = self._judge("search", candidate.prefix_ids)
        with candidate.quantized(self.model):
            score = judge.judge(None if rival is None or rival.given_up else rival.worths)
        given_up = len(score.divergence) < judge.blocks
        self._say("search", candidate, score, judge, " (given up)" if given_up else "")
        return _State(candidate, score, score.worths(judge.reference_nll), score.ratio(judge.reference_nll), given_up)

    def _say(self, part: str, candidate: Candidate, score: Score, judge: Judge, end: str = "") -> None:
        ratio = score.ratio(judge.reference_nll)
        with_ratio = "" if ratio is None else f", ratio {ratio}"
        self.say(f"{part} {candidate.name}: divergence {score.mean:.5f}{with_ratio}{end}")

    def _met(self, state: _State) -> bool:
        """Whether the target is met on the search blocks, by the upper end of the interval: they are few."""
        worst = 1 + state.score.interval().high if state.ratio is None else state.ratio.high
        return worst <= self.options.target

    def _note(self, state: _State) -> None:
        """A line of the table, from blocks that the search has not seen."""
        judge = self._judge("verify", state.candidate.prefix_ids)
        with state.candidate.quantized(self.model):
            self._row(state.candidate, judge)

    def _row(self, candidate: Candidate, judge: Judge) -> None:
        score = judge.judge()
        self._say("verify", candidate, score, judge)
        now = time.perf_counter()
        ratio = score.ratio(judge.reference_nll)
        self.rows.append(Row(candidate, score.interval(), ratio, round(now - self.begin, 1)))
        self.begin = now

    def _smooth(self, state: _State) -> list[_State]:
        """The best single alpha."""
        return [self._one_alpha(state.candidate, _ALPHA)] if len(self._found_pairs()) else []

    def _found_pairs(self) -> Pairs:
        if not len(self.pairs):
            self.pairs = find_pairs(self.model)
            self.skipped |= {f"smooth {name}": reason for name, reason in self.pairs.skipped.items()}
        return self.pairs

    def _one_alpha(self, base: Candidate, start: float, rival: _State | None = None) -> _State:
        """Walks from an alpha in the direction that helps, up or else down, as long as it does.

        Where the start is clearly worse than the rival, its neighbours are not tried.
        """
        best = self._try(self._smoothed(base, start), rival)
        for step in (_STEP, -_STEP):
            alpha = round(start + step, 3)
            while 0 <= alpha <= 1 and not best.given_up:
                tried = self._try(self._smoothed(base, alpha), best)
                if tried.worth >= best.worth:
                    break
                best, alpha = tried, round(alpha + step, 3)
            if best.candidate.alpha != start:
                break
        return best

    def _smoothed(self, base: Candidate, alpha: float | Mapping[str, float]) -> Candidate:
        sweep = SmoothingSweep(self.pairs, base.measurement, include_sink=base.prefix is None)
        smoothing = sweep.smoothing(alpha)
        return replace(base, smoothing=smoothing, ranges=smoothed_ranges(base.measurement, smoothing))

    def _prefix(self, state: _State) -> list[_State]:
        """Smoothing again, behind each of the best prefixes; the better one."""
        if self._judge("search", ()).reference_nll is None:
            self.skipped["prefix"] = "the model predicts no tokens, so nothing can be put in front"
            return []
        found = find_prefixes(self.opened, self.blocks)
        if not found:
            self.skipped["prefix"] = "no prefix lowers the ranges: the model has no sink that one takes"
        states: list[_State] = []
        for prefix in found:
            bare = replace(state.candidate, prefix=prefix, smoothing=None)
            measured = self._measure(bare, self.few, sites=["linear_input"])
            bare = replace(bare, measurement=measured, ranges=measured)
            alpha, rival = state.candidate.alpha, min([state, *states], key=lambda one: one.worth)
            states.append(self._try(bare, rival) if alpha is None else self._one_alpha(bare, alpha, rival))
        return [min(states, key=lambda one: one.worth)] if states else []

    def _resample(self, state: _State) -> list[_State]:
        """Ranges that also cover what the model itself would have written; smoothing again, to fit them."""
        if self._judge("search", ()).reference_nll is None:
            self.skipped["resample"] = "the model predicts no tokens, so it cannot write text"
            return []
        base = replace(state.candidate, resampled=resampled(self.opened, self.few))
        measured = self._measure(base, self.few, sites=["linear_input"])
        bare = replace(base, measurement=measured, ranges=measured, smoothing=None)
        alpha = base.alpha
        return [self._try(bare, state) if alpha is None else self._one_alpha(bare, alpha, state)]

    def _roles(self, state: _State) -> list[_State]:
        """One alpha for each role, by coordinate descent from the single one."""
        if state.candidate.smoothing is None:
            return []
        alphas = dict(zip((p.name for p in self.pairs), state.candidate.smoothing.alphas, strict=True))
        best = state
        for names in names_by_role(self.pairs).values():
            now = alphas[names[0]]
            for alpha in (round(now - _STEP, 3), round(now + _STEP, 3)):
                trial = {**alphas, **dict.fromkeys(names, alpha)}
                if 0 <= alpha <= 1:
                    tried = self._try(self._smoothed(state.candidate, trial), best)
                    if tried.worth < best.worth:
                        best, alphas = tried, trial
                        break
        return [] if best is state else [best]

    def _rotate(self, state: _State) -> list[_State]:
        """The inputs of layers behind products and non-linear functions, rotated as they arrive."""
        try:
            rotation = OnlineRotation.by_role(self.model)
        except UsageError as error:
            self.skipped["rotate"] = str(error)
            return []
        modules = set(rotation.modules)
        base = state.candidate
        smoothing = base.smoothing
        states = []
        for alpha in (None,) if smoothing is None else (0.5, 0.7):
            one = base
            if alpha is not None and smoothing is not None:
                alphas = {
                    p.name: alpha if {c.module for c in p.consumers} <= modules else a
                    for p, a in zip(self.pairs, smoothing.alphas, strict=True)
                }
                one = self._smoothed(base, alphas)
            rotated = replace(one, rotation=rotation)
            with rotated.apply(self.model):
                ranges = self._measure(rotated, self.few, sites=["linear_input"])
            states.append(self._try(replace(rotated, ranges=ranges)))
        return [min(states, key=lambda one: one.worth)]

    def _scale(self, state: _State) -> list[_State]:
        """Loud channels brought down in front of the layers that no pair ends in, as their inputs arrive."""
        scaled = state.candidate.scaled(self.model, self._found_pairs())
        if scaled is None:
            self.skipped["scale"] = "no layer that smoothing cannot reach has loud channels"
        return [] if scaled is None else [self._try(scaled)]

    def _compensate(self, state: _State) -> list[_State]:
        """Weights rounded so that errors cancel over the inputs that were seen."""
        base = state.candidate
        enough = -(-_HESSIAN_TOKENS // self.blocks.input_ids.shape[1])
        rows = self.blocks.select(range(min(enough, len(self.blocks)))).with_prefix(base.prefix_ids)
        plan = base.planned(self.model)
        linear = [name for name in plan.weights if is_linear(self.model.get_submodule(name))]
        if not linear:
            self.skipped["compensate"] = "the model has no linear layers whose inputs can be collected"
            return []
        judge = self._judge("search", base.prefix_ids)
        with base.apply(self.model), QuantizedModel(self.model, replace(plan, inputs={})):
            lost = max(0.0, float(judge.judge().worths(judge.reference_nll).mean()))
        if lost <= _WEIGHTS_SHARE * state.worth or state.worth <= 0:
            self.skipped["compensate"] = f"rounding the weights costs {lost:.2g} of {state.worth:.2g} lost, too little"
            return []
        with base.apply(self.model):
            with (
                torch.no_grad(),
                without_head(self.model) if can_skip_head(self.model, input_device(self.model)) else nullcontext(),
                collect_hessians(self.model, linear, skip_positions=len(base.prefix_ids)) as hessians,
            ):
                for batch in rows.batches(self.options.batch_size):
                    self.model(input_ids=torch.from_numpy(rows.input_ids[batch]).to(input_device(self.model)))
            plan = compensated(plan, self.model, hessians, order="activation")
        return [self._try(replace(base, plan=plan, compensated=True))]

    def _keep(self, state: _State) -> list[_State]:
        """Layer by layer into float, each time the one whose rounding costs most."""
        best = state
        plan = state.candidate.planned(self.model)
        shortlist = loudest(state.candidate.ranges, plan, include_sink=state.candidate.prefix is None)
        for _ in range(self.options.keep):
            tried = []
            for name in shortlist:
                if name not in best.candidate.kept:
                    kept = (*best.candidate.kept, name)
                    without = plan.without(dict.fromkeys(kept, KEPT))
                    tried.append(self._try(replace(best.candidate, plan=without, kept=kept)))
            winner = min(tried, key=lambda one: one.worth, default=best)
            if winner.worth >= best.worth:
                break
            best = winner
            if self._met(best):
                break
        return [] if best is state else [best]

    def _measure(self, candidate: Candidate, blocks: TokenBlocks, sites: Sequence[str] = ()) -> Measurement:
        """Of the model as it is now, on what the ranges of a candidate cover."""
        ids = candidate.prefix_ids
        if candidate.resampled is not None:
            blocks = blocks.joined(candidate.resampled)
        sinks = len(ids) or self.measurement.run.sink_positions
        options = MeasureOptions(batch_size=self.options.batch_size, sites=sites, sink_positions=sinks)
        return measure(self.opened, blocks.with_prefix(ids), options)

    def _apply(self, state: _State) -> Cured:
        """Applies the chosen cures for good, and measures and verifies the model as it is then."""
        met, candidate = self._met(state), state.candidate
        judge = self._judge("verify", candidate.prefix_ids)
        records = candidate.records()
        cures = (candidate.prefix, candidate.smoothing, candidate.rotation, candidate.scaling)
        changed = any(cure is not None for cure in cures)
        with candidate.apply(self.model) as applied:  # an error reverts
            measurement = self.measurement
            if changed:
                self.opened = self.opened.cured([record.model_dump_json() for record in records])
            if changed or candidate.resampled is not None:
                measurement = self._measure(candidate, self.blocks)
            scales = choose_scales(
                measurement,
                bits=self.options.bits,
                symmetric=self.options.symmetric,
                weight_granularity=self.options.weight_granularity,
                include_sink=candidate.prefix is None,
            )
            final = replace(candidate, ranges=measurement, plan=None).planned(self.model)
            if candidate.plan is not None:
                final = final.with_weights({n: w for n, w in candidate.plan.weights.items() if n in final.weights})
            with QuantizedModel(self.model, final):
                self._row(replace(candidate, ranges=measurement, plan=final), judge)
            applied.pop_all()  # nothing is reverted from here on
        ignore = [*scales.ignore, *(name for name in candidate.kept if name not in scales.ignore)]
        scales = scales.model_copy(update={"cures": records, "ignore": ignore})
        outcome = "meets" if met else "is the best that was found, and misses"
        last = self.rows[-1]
        verified = f"relative error {last.divergence}" if last.ratio is None else f"ratio {last.ratio}"
        target = f"the target of {self.options.target:g} on the search blocks"
        reason = f"{candidate.name} {outcome} {target}; verified on others: {verified}"
        return Cured(self.opened, scales, measurement, final, self.rows, reason, self.skipped)
