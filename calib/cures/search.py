# SPDX-License-Identifier: Apache-2.0
"""`find_cure`: the cheapest set of cures that meets a target, found by what comes out of the quantized model.

A ladder is climbed, cheap cures first: nothing; smoothing; smoothing behind a prefix; error-compensated weights;
layers left in float. Each rung keeps what the last one found. The search looks at one part of the held-out blocks; the
ablation table comes from another part, which no decision has seen.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from calib.corpus import TokenBlocks
from calib.cures.find import find_pairs
from calib.cures.judge import Judge, Score
from calib.cures.pairs import Pair, Pairs
from calib.cures.prefix import Prefix, find_prefixes
from calib.cures.ranges import smoothed_ranges
from calib.cures.record import smoothing_record
from calib.cures.result import Cured, CureOptions, Row
from calib.cures.smooth import Smoothing
from calib.cures.sweep import SmoothingSweep
from calib.errors import ModelError, UsageError
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel
from calib.quantized import QuantizationPlan, QuantizedModel, plan_from_scales
from calib.quantized.grid import IntegerGrid
from calib.quantized.hessian import collect_hessians, compensated
from calib.quantized.weights import WeightScheme
from calib.scales import choose_scales
from calib.schema.scales import CureRecord

__all__ = ["find_cure"]

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
_STEP = 0.1
_KEEP_SHORTLIST = 10
_JUDGES_HELD = 3
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class _State:
    """A candidate: what it does, and what it is worth on the search blocks."""

    name: str
    score: Score
    measurement: Measurement
    prefix: Prefix | None = None
    smoothing: Smoothing | None = None
    plan: QuantizationPlan | None = None
    kept: tuple[str, ...] = ()


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
        opened: the float model; on return its weights carry the smoothing (not if an error is raised).
        measurement: of this model on `blocks`, with full statistics.
        blocks: for ranges.
        held_out: for decisions (first half) and the verdict (second half); disjoint from `blocks`.
        options: what may be done.
        say: called with a line about each step.

    Raises:
        UsageError: an option is unknown, or there are fewer than two held-out blocks.
        ModelError: nothing of the model can be quantized.
    """
    options = options or CureOptions()
    if len(held_out) < 2:
        raise UsageError(f"cures: {len(held_out)} held-out blocks; give two or more, one to search and one to verify")
    return _Search(opened, measurement, blocks, held_out, options, say).run()


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
        half = max(1, len(held_out) // 2)
        self.search_blocks, self.verify_blocks = (
            held_out.select(range(half)),
            held_out.select(range(half, len(held_out))),
        )
        self.judges: dict[tuple[tuple[int, ...], bool], Judge] = {}
        self.pairs: Pairs = Pairs((), {})
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.begin = time.perf_counter()

    def run(self) -> Cured:
        """Climbs the ladder."""
        allowed = self.options.cures
        state = self._state("none", self.measurement)
        if not self._note(state) and "smooth" in allowed:
            self.pairs = find_pairs(self.model)
            self.skipped |= {f"smooth {name}": reason for name, reason in self.pairs.skipped.items()}
            if len(self.pairs):
                state = self._better(state, self._smooth(self.measurement, None))
        if not self._met(state) and "prefix" in allowed:
            state = self._better(state, *self._behind_prefixes(state))
        if not self._met(state) and state.smoothing is not None:
            state = self._better(state, self._refined(state))
        if not self._met(state) and "compensate" in allowed:
            state = self._better(state, self._compensated(state))
        if not self._met(state) and "keep" in allowed and self.options.keep:
            state = self._better(state, self._kept(state))
        return self._apply(state)

    def _judge(self, prefix: Prefix | None, *, verify: bool = False) -> Judge:
        """The judge of a prefix. Made while the model is in its original state."""
        ids = () if prefix is None else prefix.token_ids
        key = (ids, verify)
        if key not in self.judges:
            while len(self.judges) >= _JUDGES_HELD:  # each holds the outputs of the float model
                self.judges.pop(next(iter(self.judges)))
            rows = self.verify_blocks if verify else self.search_blocks
            self.judges[key] = Judge(self.model, rows, prefix=ids, batch_size=self.options.batch_size)
        return self.judges[key]

    def _plan(self, measurement: Measurement, prefix: Prefix | None, kept: Sequence[str] = ()) -> QuantizationPlan:
        """As an exported checkpoint has it: its grids, weights rounded per row from what the model holds now."""
        ranges = choose_scales(
            measurement, bits=self.options.bits, symmetric=self.options.symmetric, include_sink=prefix is None
        )
        plan = plan_from_scales(
            self.model,
            ranges,
            weights=WeightScheme(IntegerGrid.of(self.options.bits, convention=_CONVENTION)),
            convention=_CONVENTION,
            skip_positions=0 if prefix is None else len(prefix.token_ids),
        )
        return plan.without(dict.fromkeys(kept, "kept in float for its effect on the output")) if kept else plan

    def _state(
        self,
        name: str,
        measurement: Measurement,
        prefix: Prefix | None = None,
        smoothing: Smoothing | None = None,
        plan: QuantizationPlan | None = None,
        kept: tuple[str, ...] = (),
    ) -> _State:
        """Quantizes the model with a candidate's cures and judges it; the model is then as before."""
        judge = self._judge(prefix)
        with ExitStack() as stack:
            ranges = measurement
            if smoothing is not None:
                stack.enter_context(smoothing.apply(self.model))
                ranges = smoothed_ranges(measurement, smoothing)
            chosen = plan or self._plan(ranges, prefix, kept)
            stack.enter_context(QuantizedModel(self.model, chosen))
            score = judge.judge()
        self.say(f"{name}: divergence {score.mean:.5f}")
        return _State(name, score, measurement, prefix, smoothing, plan, kept)

    def _smooth(self, measurement: Measurement, prefix: Prefix | None, alphas: Sequence[float] = ALPHAS) -> _State:
        """The best single alpha."""
        sweep = SmoothingSweep(self.pairs, measurement, include_sink=prefix is None)
        front = "" if prefix is None else f"prefix {prefix.text!r} + "
        states = [
            self._state(f"{front}smooth {alpha:g}", measurement, prefix, sweep.smoothing(alpha)) for alpha in alphas
        ]
        return min(states, key=lambda state: state.score.mean)

    def _behind_prefixes(self, state: _State) -> list[_State]:
        if getattr(self.model, "get_input_embeddings", None) is None or not self._judge(None).reference_nll is not None:
            self.skipped["prefix"] = "the model predicts no tokens, so nothing can be put in front"
            return []
        found = find_prefixes(self.opened, self.blocks)
        if not found:
            self.skipped["prefix"] = "no prefix lowers the ranges: the model has no sink that one takes"
        states = []
        for prefix in found:
            measured = self._measured(prefix)
            if state.smoothing is None:
                states.append(self._state(f"prefix {prefix.text!r}", measured, prefix))
            else:
                best = state.smoothing.alphas[0]
                near = [a for a in ALPHAS if abs(a - best) <= _STEP + 1e-9]
                states.append(self._smooth(measured, prefix, near))
        return states

    def _refined(self, state: _State) -> _State:
        """One alpha for each role, by coordinate descent from the single one."""
        assert state.smoothing is not None
        sweep = SmoothingSweep(self.pairs, state.measurement, include_sink=state.prefix is None)
        alphas = {pair.name: alpha for pair, alpha in zip(self.pairs, state.smoothing.alphas, strict=True)}
        best = state
        for role, names in _roles(self.pairs).items():
            now = alphas[names[0]]
            for alpha in (now - _STEP, now + _STEP):
                if not 0 <= alpha <= 1:
                    continue
                trial = {**alphas, **dict.fromkeys(names, round(alpha, 3))}
                label = f"{state.name}, {role} {alpha:g}"
                tried = self._state(label, state.measurement, state.prefix, sweep.smoothing(trial))
                if tried.score.mean < best.score.mean:
                    best, kept = tried, trial
                    alphas = kept
                    break
        return replace(best, name=f"{state.name}, an alpha for each of {len(_roles(self.pairs))} roles")

    def _compensated(self, state: _State) -> _State:
        """Weights rounded so that errors cancel over the inputs that were seen."""
        with ExitStack() as stack:
            ranges = state.measurement
            if state.smoothing is not None:
                stack.enter_context(state.smoothing.apply(self.model))
                ranges = smoothed_ranges(ranges, state.smoothing)
            plan = self._plan(ranges, state.prefix, state.kept)
            linear = [n for n in plan.weights if _is_linear(self.model, n)]
            ids = () if state.prefix is None else state.prefix.token_ids
            rows = self.blocks.with_prefix(ids)
            with collect_hessians(self.model, linear, skip_positions=len(ids)) as hessians:
                _run(self.opened, rows, self.options.batch_size)
            plan = compensated(plan, self.model, hessians, order="activation")
        return self._state(
            f"{state.name} + compensate", state.measurement, state.prefix, state.smoothing, plan, state.kept
        )

    def _kept(self, state: _State) -> _State:
        """Leaves out, one after the other, the layer whose rounding costs most."""
        plan = state.plan
        measurement = state.measurement
        best = state
        ranges = measurement if state.smoothing is None else smoothed_ranges(measurement, state.smoothing)
        base = plan or self._plan(ranges, state.prefix)
        shortlist = _loudest(ranges, base, state.prefix is None)
        for _ in range(self.options.keep):
            tried = [
                self._state(
                    f"{state.name}, {name} in float",
                    measurement,
                    state.prefix,
                    state.smoothing,
                    base.without({name: _KEPT}),
                    (*best.kept, name),
                )
                for name in shortlist
                if name not in best.kept
            ]
            if not tried:
                break
            winner = min(tried, key=lambda one: one.score.mean)
            if winner.score.mean >= best.score.mean:
                break
            best = winner
            assert best.plan is not None
            base = best.plan
            if self._met(best):
                break
        return replace(best, name=f"{state.name} + keep {len(best.kept)}") if best.kept else best

    def _better(self, state: _State, *tried: _State) -> _State:
        """The best of a rung, noted in the table; what was there stays if nothing is better."""
        for one in tried:
            self._note(one)
        return min([state, *tried], key=lambda one: one.score.mean)

    def _met(self, state: _State) -> bool:
        ratio = state.score.ratio(self._judge(state.prefix).reference_nll)
        return (1 + state.score.mean if ratio is None else ratio.value) <= self.options.target

    def _note(self, state: _State) -> bool:
        """Verifies a state on blocks that the search has not seen; returns whether it met the target where it has."""
        judge = self._judge(state.prefix, verify=True)
        with ExitStack() as stack:
            ranges = state.measurement
            if state.smoothing is not None:
                stack.enter_context(state.smoothing.apply(self.model))
                ranges = smoothed_ranges(ranges, state.smoothing)
            plan = state.plan or self._plan(ranges, state.prefix, state.kept)
            stack.enter_context(QuantizedModel(self.model, plan))
            score = judge.judge()
        now = time.perf_counter()
        self.rows.append(
            Row(state.name, score.interval(), score.ratio(judge.reference_nll), round(now - self.begin, 1))
        )
        ratio = self.rows[-1].ratio
        self.say(f"{state.name}: verified, divergence {score.mean:.5f}" + (f", ratio {ratio}" if ratio else ""))
        self.begin = now
        return self._met(state)

    def _measured(self, prefix: Prefix | None, *, full: bool = False) -> Measurement:
        ids = () if prefix is None else prefix.token_ids
        options = MeasureOptions(
            batch_size=self.options.batch_size,
            sites=[] if full else ["linear_input"],
            sink_positions=len(ids) or self.measurement.run.sink_positions,
            weights=True,
        )
        return measure(self.opened, self.blocks.with_prefix(ids), options)

    def _apply(self, state: _State) -> Cured:
        """Folds the chosen cures for good, and measures the model as it is then."""
        if state.smoothing is not None:
            state.smoothing.apply(self.model)
        changed = state.smoothing is not None or state.prefix is not None
        measurement = self._measured(state.prefix, full=True) if changed else self.measurement
        plan = state.plan or self._plan(measurement, state.prefix, state.kept)
        scales = choose_scales(
            measurement,
            bits=self.options.bits,
            symmetric=self.options.symmetric,
            include_sink=state.prefix is None,
        )
        records: list[CureRecord] = []
        if state.prefix is not None:
            records.append(state.prefix.record())
        if state.smoothing is not None:
            records.append(smoothing_record(state.smoothing))
        if state.plan is not None and not state.kept:
            records.append(_compensation())
        if state.kept:
            records.append(
                CureRecord(
                    kind="keep", summary=f"{len(state.kept)} layers in float", settings={"modules": list(state.kept)}
                )
            )
        scales = scales.model_copy(
            update={"cures": records, "ignore": [*scales.ignore, *(k for k in state.kept if k not in scales.ignore)]}
        )
        met = "meets" if self._met(state) else "is the best found; it misses"
        reason = f"{state.name} {met} the target of {self.options.target:g} on the search blocks"
        return Cured(scales, measurement, plan, state.prefix, state.smoothing, self.rows, reason, self.skipped)


_CONVENTION: Literal["compressed-tensors"] = "compressed-tensors"
_KEPT = "kept in float for its effect on the output"


def _compensation() -> CureRecord:
    return CureRecord(
        kind="compensate",
        summary="weights rounded with error compensation (GPTQ), channels in the order of their energy",
        settings={"order": "activation"},
    )


def _roles(pairs: Pairs) -> Mapping[str, list[str]]:
    """Names of pairs by what they do in a block: equal names but for the number of the block."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        found.setdefault(_role(pair), []).append(pair.name)
    return found


def _role(pair: Pair) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", pair.consumers[0].module).rpartition("layers.")[2]


def _is_linear(model: object, name: str) -> bool:
    from torch import nn

    module = model.get_submodule(name) if isinstance(model, nn.Module) else None
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _loudest(measurement: Measurement, plan: QuantizationPlan, include_sink: bool) -> list[str]:
    """Layers with the largest range against what their input usually is: the likely ones, to be measured."""
    from calib.statistics.observation import REST

    ratio: dict[str, float] = {}
    for name, site in measurement.sites.items():
        statistics = site.statistics
        channels = statistics.channels
        if channels is None:
            continue
        extent = statistics.range if include_sink else statistics.range.of(REST)
        typical = float(abs(channels.of(REST).amax).mean())
        for reader in (n.removesuffix(":input") for n in (name, *site.aliases)):
            if reader in plan.inputs:
                ratio[reader] = extent.amax / max(typical, 1e-30)
    return sorted(ratio, key=lambda n: -ratio[n])[:_KEEP_SHORTLIST]


def _run(opened: OpenedModel, blocks: TokenBlocks, batch_size: int) -> None:
    import torch

    from calib.measurement.head import can_skip_head, without_head

    device = next(opened.model.parameters()).device
    if not can_skip_head(opened.model, device):
        raise ModelError(f"{opened.provenance.name}: its forward pass cannot be run without its head")
    with torch.no_grad(), without_head(opened.model):
        for rows in blocks.batches(batch_size):
            opened.model(input_ids=torch.from_numpy(blocks.input_ids[rows]).to(device))
