# SPDX-License-Identifier: Apache-2.0
"""Static INT8 of SmolLM2-135M on Moby-Dick: what each cure buys, against float with the same tokens in context.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/quality.py             # about an hour on two quiet cores

Token ids of the book: 20,000.. calibration (12 x 512); 100,000.. held out for the searches (16 x 512); 200,000..
evaluation (48 x 512 for what `auto` chooses, 24 for the rows beside it; the first 12 of them to compare with older
figures).
Perplexity over positions 1..511, float32. All linear layers but the head; activations per tensor, static unless said;
weights per output row, unless said.
Other programs run on the same tokens (peer_rows.py), those that are installed.
Rows are kept in the folder of --work as they come, and not computed again (--fresh does); results/quality.json is
written once they are all there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from assets import fetch
from numpy.typing import NDArray
from peer_rows import peer_results
from results_file import write

from calib.corpus import TokenBlocks, build_blocks
from calib.cures import Cured, CureOptions, find_cure
from calib.cures.candidate import CONVENTION
from calib.cures.result import AUTO
from calib.evaluation.interval import perplexity_ratio
from calib.evaluation.language import score_tokens
from calib.measurement import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.grid import IntegerGrid
from calib.scales import choose_scales

LENGTH = 512
NAME = "quality"
_CHOSEN = ("auto", "auto without rotate-online")
"""Searches whose choice is judged on all blocks, and in other forms that it can be deployed in."""


def book(opened: OpenedModel, folder: Path) -> NDArray[np.int64]:
    text = (fetch("moby-dick") / "data.txt").read_text(encoding="utf-8")
    return np.array(opened.tokenizer(text, add_special_tokens=False).input_ids, np.int64)


def blocks_of(opened: OpenedModel, ids: NDArray[np.int64], start: int, count: int, folder: Path) -> TokenBlocks:
    rows = ids[start : start + count * LENGTH].reshape(count, LENGTH)
    path = folder / f"{start}.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    return build_blocks([path], opened.tokenizer, samples=count, max_length=LENGTH)


class Table:
    """Rows on disk, so that a run that is broken off goes on where it was."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path.exists() and not fresh else {}
        self.rows: dict[str, Any] = held.get("rows", {})
        self.searches: dict[str, Any] = held.get("searches", {})

    def save(self) -> None:
        """Keeps what there is."""
        self.path.write_text(json.dumps({"searches": self.searches, "rows": self.rows}), encoding="utf-8")

    def publish(self) -> None:
        """Writes the result."""
        write(NAME, {"model": "SmolLM2-135M-Instruct (dequantized from Q4_1)", "text": "Moby-Dick", "length": LENGTH,
                     "searches": self.searches, "rows": self.rows})  # fmt: skip


def main() -> None:  # noqa: C901, PLR0915 - one table, from top to bottom
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--few", type=int, default=24, help="blocks of the rows beside the chosen ones")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("/tmp/calib-quality"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    opened = open_model(fetch("smollm2"), device="cpu")
    model = opened.model
    ids = book(opened, arguments.work)
    calibration = blocks_of(opened, ids, 20_000, 12, arguments.work)
    held_out = blocks_of(opened, ids, 100_000, arguments.held_out, arguments.work)
    evaluation = ids[200_000 : 200_000 + arguments.blocks * LENGTH].reshape(-1, LENGTH)
    table = Table(arguments.work / "rows.json", fresh=arguments.fresh)

    def reference_of(prefix: tuple[int, ...]) -> NDArray[np.float64]:
        """Float scores, kept on disk: half of the time of a run."""
        path = arguments.work / f"float-{arguments.blocks}-{'-'.join(map(str, prefix))}.npy"
        if not path.exists():
            np.save(path, score_tokens(model, evaluation, prefix=prefix).nll)
        scores: NDArray[np.float64] = np.load(path)
        return scores

    def score(
        name: str,
        context: Callable[[], AbstractContextManager[object]],
        prefix: tuple[int, ...] = (),
        *,
        count: int = arguments.few,
        of: Any = model,
    ) -> None:
        if name in table.rows:
            return
        begin = time.perf_counter()
        reference = reference_of(prefix)[:count]
        with context():
            nll = reference if context is nullcontext else score_tokens(of, evaluation[:count], prefix=prefix).nll
        add(name, nll, reference, prefix=list(prefix), seconds=round(time.perf_counter() - begin, 1))

    def add(name: str, nll: NDArray[np.float64], reference: NDArray[np.float64], **more: object) -> None:
        row: dict[str, Any] = dict(more)
        for blocks in (12, len(nll)):
            ratio = perplexity_ratio(nll[:blocks], reference[:blocks])
            row[f"blocks_{blocks}"] = {
                "perplexity": round(float(np.exp(nll[:blocks].mean())), 4),
                "float_perplexity": round(float(np.exp(reference[:blocks].mean())), 4),
                "ratio": round(ratio.value, 5),
                "low": round(ratio.low, 5),
                "high": round(ratio.high, 5),
            }
        table.rows[name] = row
        table.save()
        print(name, row, flush=True)

    begin = time.perf_counter()
    measurement = measure(opened, calibration, MeasureOptions(batch_size=4))
    measuring = time.perf_counter() - begin
    scales = choose_scales(measurement)
    rows = WeightScheme(IntegerGrid.of(8))
    score("float", nullcontext, count=arguments.blocks)
    for name, options in {
        "plain static": {},
        "dynamic per-token": {"inputs": "dynamic-per-token"},
        "weights only": {"inputs": "none"},
    }.items():
        plan = plan_from_scales(model, scales, weights=rows, **options)
        score(name, lambda plan=plan: QuantizedModel(model, plan))

    searches = {
        "auto": CureOptions(target=1.0),
        "auto without rotate-online": CureOptions(cures=AUTO, target=1.0),
        "no prefix": CureOptions(cures=("smooth", "rotate", "rotate-online", "compensate"), target=1.0),
        "ordinary checkpoint, 3 kept": CureOptions(
            cures=("smooth", "rotate", "compensate", "keep"), target=1.0, keep=3
        ),
        "auto + resample, weights per tensor": CureOptions(
            cures=("auto", "resample"), target=1.0, weight_granularity="per-tensor"
        ),
    }
    for name, options in searches.items():
        if name in table.searches:
            continue
        begin = time.perf_counter()
        # a fresh model each: a search changes the one it is given
        mine = open_model(fetch("smollm2"), device="cpu")
        cured = find_cure(
            mine, measurement, calibration, held_out, options,
            say=lambda line: print(f"{time.perf_counter() - begin:.0f} s  {line}", flush=True),  # noqa: B023
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        candidate = cured.candidate
        best = [row for row in cured.rows if row.name.startswith("smooth")][:1]
        for row in best if name == "auto" else []:
            score(f"best single alpha: {row.name}", lambda c=row.candidate: c.quantized(model))
        ids_ = candidate.prefix_ids
        count = arguments.blocks if name in _CHOSEN else arguments.few
        chosen = f"{name} (chosen): {candidate.name}"
        score(chosen, lambda: QuantizedModel(mine.model, cured.plan), ids_, count=count, of=mine.model)  # noqa: B023
        if name in _CHOSEN:
            _as_deployed(name, cured, mine, score, count)
        table.searches[name] = {
            "options": dataclasses.asdict(options),
            "chosen": candidate.name,
            "reason": cured.reason,
            "seconds": round(seconds, 1),
            "seconds_over_measuring": round(seconds / measuring, 2),
            "measuring_seconds": round(measuring, 1),
            "ablation": [
                {"name": r.name, "divergence": dataclasses.asdict(r.divergence),
                 "ratio": None if r.ratio is None else dataclasses.asdict(r.ratio), "seconds": r.seconds}
                for r in cured.rows
            ],
        }  # fmt: skip
        table.save()

    few, plain = evaluation[: arguments.few], reference_of(())[: arguments.few]
    for peer in peer_results(opened, calibration.input_ids, few, arguments.work, set(table.rows)):
        add(peer.name, peer.nll, plain, prefix=[], version=peer.version, seconds=peer.seconds)
    table.publish()


def _as_deployed(name: str, cured: Cured, mine: OpenedModel, score: Callable[..., None], count: int) -> None:
    """Of what was chosen: keys and values in INT8 too; and the prefix as any other tokens, not from a float cache."""
    ids = cured.candidate.prefix_ids
    plan = plan_from_scales(
        mine.model, cured.scales, kv_cache="static", weights=WeightScheme(IntegerGrid.of(8, convention=CONVENTION)),
        skip_positions=len(ids), convention=CONVENTION,
    ).with_weights(cured.plan.weights)  # fmt: skip
    score(f"{name} + INT8 KV cache", lambda: QuantizedModel(mine.model, plan), ids, count=count, of=mine.model)
    tokens = dataclasses.replace(cured.plan, skip_positions=0)
    score(f"{name}, prefix as ordinary tokens", lambda: QuantizedModel(mine.model, tokens), ids, of=mine.model)


if __name__ == "__main__":
    main()
