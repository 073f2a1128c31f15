# SPDX-License-Identifier: Apache-2.0
"""`find_cure`: the cheapest set of cures that meets a target, found by what comes out of the quantized model.

A ladder is climbed, cheap cures first: nothing; smoothing; smoothing behind a prefix; ranges from more text; rotations;
loud channels brought down in front of layers that smoothing cannot reach; error-compensated weights; layers left in
float. Each rung keeps what the last one found. The search looks at one part of the held-out blocks; the ablation table
comes from another part, which no decision has seen.
"""

from __future__ import annotations

from calib.corpus import TokenBlocks
from calib.cures.candidate import Candidate
from calib.cures.clip import Clip
from calib.cures.judge import Judge
from calib.cures.result import Cured, CureOptions
from calib.cures.rungs import RUNGS
from calib.cures.trials import Say, Trial, Trials
from calib.errors import GateError, UsageError
from calib.measurement.artifact import Measurement
from calib.models import OpenedModel

__all__ = ["find_cure"]

_CLIPPED_ROWS = 4
"""Blocks that a clip is judged on apart from those of the search: those that lose most by it."""


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
        measurement: of this model, with full statistics, on `blocks` or the first `SEARCH_ROWS` of them, which is all
            that the search itself uses.
        blocks: for ranges; what is chosen is measured on all.
        held_out: for decisions (the first half) and the table (the others); disjoint from `blocks`.
        options: what may be done.
        say: called with a line about each step.

    Raises:
        UsageError: an option is unknown, or there are fewer than two held-out blocks.
        ModelError: nothing of the model can be quantized.
        GateError: an output is NaN, or the cured model has values that no scale may come from.
    """
    if len(held_out) < 2:
        raise UsageError(f"cures: {len(held_out)} held-out blocks; give two or more, one to search and one to verify")
    trials = Trials(opened, measurement, blocks, held_out, options or CureOptions(), say)
    try:
        best = _climb(trials)
    finally:
        trials.release()
    return _apply(trials, best)


def _climb(trials: Trials) -> Trial:
    """Up the ladder until the target is met; returns the best that was tried."""
    options, measured = trials.options, trials.measurement
    best = trials.attempt(Candidate(options.bits, options.symmetric, measured, measured, options.weight_granularity))
    for name, rung in RUNGS.items():
        if name in trials.cures and not trials.met(best):
            trials.note(best)
            found = rung(trials, best)
            if found is not None and found.worth < best.worth:
                best = found
            elif found is not None:
                trials.note(found)
    return best


def _apply(trials: Trials, best: Trial) -> Cured:
    """Applies the chosen cures for good, and measures and verifies the model as it is then."""
    candidate, model = best.candidate, trials.model
    search, verify = (trials.judge(part, candidate.prefix_ids) for part in ("search", "verify"))
    records = candidate.records()
    with candidate.apply(model) as applied:  # an error reverts
        if candidate.changes_model:
            trials.opened = trials.opened.cured([record.model_dump_json() for record in records])
        if candidate.changes_model or candidate.resampled is not None or not trials.measured_all:
            trials.say(f"measuring {candidate.name} on {len(trials.blocks)} blocks")
            measurement = trials.measure(candidate, trials.blocks)
            failed = [gate for gate in measurement.gates if not gate.passed]
            if failed:
                raise GateError(f"{candidate.name}: gate {failed[0].name} failed: {failed[0].detail}")
            candidate = _fitted(trials, best, candidate.with_ranges(model, measurement), search)
        else:
            candidate = candidate.with_ranges(model, trials.measurement)
        assert candidate.plan is not None
        with trials.running(candidate.plan):
            trials.note_as_it_is(candidate, verify)
        applied.pop_all()  # nothing is reverted from here on
    scales = candidate.scales()
    ignore = [*scales.ignore, *(name for name in candidate.kept if name not in scales.ignore)]
    scales = scales.model_copy(update={"cures": candidate.records(), "ignore": ignore})
    reason = _reason(trials, best)
    return Cured(trials.opened, scales, candidate.ranges, candidate.plan, trials.rows, reason, trials.skipped)


def _fitted(trials: Trials, best: Trial, whole: Candidate, search: Judge) -> Candidate:
    """Clipped to the ranges that were searched with, where those of all the text are surely worse.

    Unless the text that is clipped most would lose by it: massive activations carry what a model needs.

    Args:
        trials: of the search; the model has the cures, and is float.
        best: what was chosen, with the ranges of the search.
        whole: the same with those of all the text.
        search: what it was chosen by.
    """
    clip = Clip.to(best.candidate.ranges, whole.ranges, include_sink=whole.prefix is None)
    if clip is None:
        return whole
    score = trials.scored(whole, search, best.score)
    said = f"{len(clip.limits)} ranges grew from {clip.blocks} to {clip.all_blocks} blocks: divergence {score.mean:.5f}"
    if not score.surely_worse(best.score.divergence):
        trials.say(f"{said}, no clipping")
        return whole
    clipped = whole.with_ranges(trials.model, whole.ranges, clip)
    rows = clip.most_affected(whole.ranges, trials.blocks, len(whole.prefix_ids), _CLIPPED_ROWS)
    if len(rows):
        blocks = trials.blocks.select(rows)
        judge = Judge(trials.model, blocks, prefix=whole.prefix_ids, batch_size=trials.options.batch_size)
        ours, theirs = (trials.scored(one, judge).mean for one in (clipped, whole))
        said += f", clipped {best.worth:.5f}; on the {len(rows)} blocks that are clipped most {theirs:.5f}, {ours:.5f}"
        if ours > theirs:
            trials.skipped["clip"] = f"text that is clipped loses by it: divergence {ours:.5f} instead of {theirs:.5f}"
            trials.say(f"{said}, no clipping")
            return whole
    trials.say(said)
    return clipped


def _reason(trials: Trials, best: Trial) -> str:
    outcome = "meets" if trials.met(best) else "is the best that was found, and misses"
    last = trials.rows[-1]
    verified = f"relative error {last.divergence}" if last.ratio is None else f"ratio {last.ratio}"
    target = f"the target of {trials.options.target:g} on the search blocks"
    return f"{best.candidate.name} {outcome} {target}; verified on others: {verified}"
