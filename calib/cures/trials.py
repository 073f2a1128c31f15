# SPDX-License-Identifier: Apache-2.0
"""`Trials`: candidates judged on held-out blocks; what the rungs of the search have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from calib.corpus import TokenBlocks
from calib.cures.candidate import Candidate
from calib.cures.find import find_pairs
from calib.cures.judge import Judge, Score
from calib.cures.pairs import Pairs
from calib.cures.result import AUTO, AUTO_DECODER, CureOptions, Row
from calib.evaluation.interval import Interval
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel

__all__ = ["Say", "Trial", "Trials"]

_SEARCH_SHARE = 0.4  # of the held-out blocks; the others verify
_SEARCH_ROWS = 16  # blocks behind each prefix or rotation while searching; the chosen one is measured on all
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


class Trials:
    """One search: its model, texts and judges, and the table that it makes.

    Args:
        opened: the float model; candidates are applied to it and taken back.
        measurement: of this model on `blocks`.
        blocks: for ranges.
        held_out: for decisions (the first 40 %) and the table (the others).
        options: of the search.
        say: called with a line about each candidate.

    Attributes:
        few: the blocks that ranges come from while searching.
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
        self.few = blocks.select(range(min(_SEARCH_ROWS, len(blocks))))
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        cut = max(1, round(_SEARCH_SHARE * len(held_out)))
        self._held_out = {"search": held_out.select(range(cut)), "verify": held_out.select(range(cut, len(held_out)))}
        self._judges: dict[tuple[str, tuple[int, ...]], Judge] = {}
        self._say = say
        self._begin = time.perf_counter()

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
        """The judge of a prefix; made only while the model is in its original state."""
        key = (part, ids)
        found = self._judges.pop(key, None)
        while len(self._judges) >= _JUDGES_HELD:  # each holds the outputs of the float model; the latest are kept
            self._judges.pop(next(iter(self._judges)))
        if found is None:
            found = Judge(self.model, self._held_out[part], prefix=ids, batch_size=self.options.batch_size)
        self._judges[key] = found
        return found

    def attempt(self, candidate: Candidate, rival: Trial | None = None) -> Trial:
        """Judges a candidate on the search blocks, and gives it up once it is clearly worse than a rival."""
        judge = self.judge("search", candidate.prefix_ids)
        with candidate.quantized(self.model):
            score = judge.judge(None if rival is None or rival.given_up else rival.score.divergence)
        given_up = len(score.divergence) < judge.blocks
        self._tell("search", candidate, score, judge, " (given up)" if given_up else "")
        return Trial(candidate, score, score.ratio(judge.reference_nll), given_up)

    def met(self, trial: Trial) -> bool:
        """Whether the target is met on the search blocks, by the upper end of the interval: they are few."""
        worst = 1 + trial.score.interval().high if trial.ratio is None else trial.ratio.high
        return worst <= self.options.target

    def note(self, trial: Trial) -> None:
        """A line of the table, from blocks that the search has not seen."""
        judge = self.judge("verify", trial.candidate.prefix_ids)
        with trial.candidate.quantized(self.model):
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
        with candidate.apply(self.model):
            return self.measure(candidate, self.few, sites=["linear_input"])

    def measure(self, candidate: Candidate, blocks: TokenBlocks, sites: Sequence[str] = ()) -> Measurement:
        """Of the model as it is now, on what the ranges of a candidate cover."""
        ids = candidate.prefix_ids
        if candidate.resampled is not None:
            blocks = blocks.joined(candidate.resampled)
        sinks = len(ids) or self.measurement.run.sink_positions
        options = MeasureOptions(batch_size=self.options.batch_size, sites=sites, sink_positions=sinks)
        return measure(self.opened, blocks.with_prefix(ids), options)

    def _tell(self, part: str, candidate: Candidate, score: Score, judge: Judge, end: str = "") -> None:
        ratio = score.ratio(judge.reference_nll)
        with_ratio = "" if ratio is None else f", ratio {ratio}"
        self._say(f"{part} {candidate.name}: divergence {score.mean:.5f}{with_ratio}{end}")
