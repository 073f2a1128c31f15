# SPDX-License-Identifier: Apache-2.0
"""`Trials`: candidates judged on held-out blocks; what the rungs of the search have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from calib.corpus import TokenBlocks
from calib.cures.candidate import Candidate
from calib.cures.find import find_pairs
from calib.cures.judge import Judge, Score
from calib.cures.offline import OfflineRotation
from calib.cures.pairs import Pairs
from calib.cures.result import AUTO, AUTO_DECODER, CureOptions, Row
from calib.cures.rotate import Rotated
from calib.evaluation.interval import Interval
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel
from calib.models.device import input_device
from calib.quantized import QuantizationPlan, QuantizedModel
from calib.quantized.int8 import has_fast_int8

__all__ = ["SEARCH_ROWS", "Say", "Trial", "Trials", "search_rows"]

SEARCH_ROWS = 8
"""Blocks that ranges come from while searching; the chosen candidate is measured on all."""
_SEARCH_SHARE = 0.5  # of the held-out blocks; the others verify
_JUDGES_HELD = 3
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate and what it is worth on the search blocks; not all of them, if it was given up."""

    candidate: Candidate
    score: Score
    ratio: Interval | None
    given_up: bool = False

    @property
    def worth(self) -> float:
        """Mean divergence, lower is better."""
        return math.inf if self.given_up else self.score.mean


def search_rows(blocks: TokenBlocks) -> TokenBlocks:
    """The first `SEARCH_ROWS` blocks."""
    return blocks.select(range(min(SEARCH_ROWS, len(blocks))))


class Trials:
    """One search: its model, texts and judges, and the table that it makes.

    Args:
        opened: the float model; candidates are applied to it and taken back.
        measurement: of this model, on the first `SEARCH_ROWS` of `blocks` at least.
        blocks: for ranges.
        held_out: for decisions (the first half) and the table (the others).
        options: of the search.
        say: called with a line about each candidate.

    Attributes:
        few: the blocks that ranges come from while searching: the first `SEARCH_ROWS`, which may leave an expert of a
            model that routes tokens without any; all for such a model whose measurement is of all.
        rows: the table.
        skipped: cures that do not apply -> the reason.
    """

    def __init__(
        self,
        opened: OpenedModel,
        measurement: Measurement,
        blocks: TokenBlocks,
        held_out: TokenBlocks,
        options: CureOptions,
        say: Say,
    ) -> None:
        self.opened, self.model, self.options = opened, opened.model, options
        self.blocks, self.measurement = blocks, measurement
        routed = any(kind.startswith("expert") for site in measurement.sites.values() for kind in site.kinds)
        self.few = blocks if routed and self.measured_all else search_rows(blocks)
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        cut = max(1, round(_SEARCH_SHARE * len(held_out)))
        self._held_out = {"search": held_out.select(range(cut)), "verify": held_out.select(range(cut, len(held_out)))}
        self._judges: dict[tuple[str, tuple[int, ...]], Judge] = {}
        self._held: tuple[OfflineRotation, Rotated] | None = None
        self._noted: set[Trial] = set()
        self.say = say
        self._begin = time.perf_counter()
        self._mode: Literal["fake", "int8"] = "int8" if has_fast_int8(input_device(self.model)) else "fake"

    @property
    def measured_all(self) -> bool:
        """Whether the given measurement is of all blocks."""
        return self.measurement.corpus.content_sha256 == self.blocks.provenance.content_sha256

    @cached_property
    def pairs(self) -> Pairs:
        """Of the model; first asked for while it is in its original state."""
        pairs = find_pairs(self.model)
        self.skipped |= {f"smooth {name}": reason for name, reason in pairs.skipped.items()}
        return pairs

    @cached_property
    def predicts(self) -> bool:
        """Whether the model predicts tokens; first asked for while it is in its original state."""
        return self.judge("search", ()).reference_nll is not None

    @cached_property
    def cures(self) -> tuple[str, ...]:
        """The allowed ones, `auto` spelled out."""
        auto = AUTO_DECODER if self.predicts else AUTO
        return tuple(one for name in self.options.cures for one in (auto if name == "auto" else (name,)))

    def judge(self, part: str, ids: tuple[int, ...]) -> Judge:
        """The judge of a prefix; made of the model in its original state, so not while a candidate is applied."""
        key = (part, ids)
        found = self._judges.pop(key, None)
        while len(self._judges) >= _JUDGES_HELD:  # each holds the outputs of the float model; the latest are kept
            self._judges.pop(next(iter(self._judges)))
        if found is None:
            self.release()
            found = Judge(self.model, self._held_out[part], prefix=ids, batch_size=self.options.batch_size)
        self._judges[key] = found
        return found

    def applied(self, candidate: Candidate) -> ExitStack:
        """The model with a candidate's cures, still float. Closing the result takes them back.

        But for a rotation, which costs more than all others: it stays in the weights until another one is needed, none
        is, or `release`.
        """
        return candidate.apply(self.model, rotated=self._rotated(candidate))

    def quantized(self, candidate: Candidate) -> AbstractContextManager[QuantizedModel]:
        """The model computes as the quantized one with a candidate's cures; a rotation stays, as in `applied`."""
        return candidate.quantized(self.model, rotated=self._rotated(candidate), mode=self._mode)

    def running(self, plan: QuantizationPlan) -> QuantizedModel:
        """The model as it is, computing by a plan."""
        return QuantizedModel(self.model, plan, mode=self._mode)

    def release(self) -> None:
        """The model in its original state."""
        if self._held is not None:
            self._held[1].revert()
            self._held = None

    def _rotated(self, candidate: Candidate) -> bool:
        """Whether there is a rotation; if so, it is in the weights now, and if not, none is."""
        rotation = candidate.rotation
        if self._held is None or self._held[0] is not rotation:
            self.release()
            self._held = None if rotation is None else (rotation, rotation.apply(self.model))
        return rotation is not None

    def attempt(self, candidate: Candidate, rival: Trial | None = None) -> Trial:
        """Judges a candidate on the search blocks, and gives it up once it is clearly worse than a rival."""
        judge = self.judge("search", candidate.prefix_ids)
        with self.quantized(candidate):
            score = judge.judge(None if rival is None or rival.given_up else rival.score.divergence)
        given_up = len(score.divergence) < judge.blocks
        self._tell("search", candidate, score, judge, " (given up)" if given_up else "")
        return Trial(candidate, score, score.ratio(judge.reference_nll), given_up)

    def scored(self, candidate: Candidate, judge: Judge, rival: Score | None = None) -> Score:
        """What a candidate with a plan makes of a model that has its cures already; see `Judge.judge`."""
        assert candidate.plan is not None
        with self.running(candidate.plan):
            return judge.judge(None if rival is None else rival.divergence)

    def met(self, trial: Trial) -> bool:
        """Whether the target is met on the search blocks, by the upper end of the interval: they are few."""
        worst = 1 + trial.score.interval().high if trial.ratio is None else trial.ratio.high
        return worst <= self.options.target

    def note(self, trial: Trial) -> None:
        """A line of the table, from blocks that the search has not seen; nothing if there is one already."""
        if trial in self._noted:
            return
        self._noted.add(trial)
        judge = self.judge("verify", trial.candidate.prefix_ids)
        with self.quantized(trial.candidate):
            self.note_as_it_is(trial.candidate, judge)

    def note_as_it_is(self, candidate: Candidate, judge: Judge) -> None:
        """The same of a model that computes as the candidate already."""
        score = judge.judge()
        self._tell("verify", candidate, score, judge)
        now = time.perf_counter()
        ratio = score.ratio(judge.reference_nll)
        self.rows.append(Row(candidate, score.interval(), ratio, round(now - self._begin, 1)))
        self._begin = now

    def ranges(self, candidate: Candidate) -> Measurement:
        """Of linear inputs with a candidate applied, on fewer blocks than `measure` is given in the end."""
        with self.applied(candidate):
            return self.measure(candidate, self.few, sites=["linear_input"])

    def measure(self, candidate: Candidate, blocks: TokenBlocks, sites: Sequence[str] = ()) -> Measurement:
        """Of the model as it is now, on what the ranges of a candidate cover."""
        ids = candidate.prefix_ids
        if candidate.resampled is not None:
            blocks = blocks.joined(candidate.resampled)
        run = self.measurement.run
        options = MeasureOptions(
            batch_size=self.options.batch_size,
            sites=sites,
            sink_positions=len(ids) or run.sink_positions,
            min_expert_tokens=run.min_expert_tokens,
            force_experts=run.force_experts,
            generate=run.generate,
            command=run.command,
        )
        return measure(self.opened, blocks.with_prefix(ids), options)

    def _tell(self, part: str, candidate: Candidate, score: Score, judge: Judge, end: str = "") -> None:
        ratio = score.ratio(judge.reference_nll)
        with_ratio = "" if ratio is None else f", ratio {ratio}"
        self.say(f"{part} {candidate.name}: divergence {score.mean:.5f}{with_ratio}{end}")
