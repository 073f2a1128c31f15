# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M teaches its own first six layers: students by the teacher as published, an MCMI teacher, its control.

`python benchmarks/distill/language.py` writes `results/distill_language.json`. The recipe is that of
`recipes/distill/language.yaml`, made small: 240 blocks of 64 tokens of Moby-Dick, of which 36 validate and 36 test, one
strength, 3 seeds (the order of the data). The class of a position is its next token. Budget: 40 minutes on one core;
what is finished is kept in `--work` and not repeated.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from assets import fetch
from paired import mean_interval
from results_file import write

from calib.distill.run import run_recipe
from calib.schema.distill import DistillRecipe, StudentRow

STRENGTH, SEEDS = 0.25, [0, 1, 2]


def recipe(model: Path) -> DistillRecipe:
    def optimiser(rate: float) -> dict[str, Any]:
        return {"name": "adamw", "learning_rate": rate, "weight_decay": 0.01, "schedule": "cosine"}

    training = {"epochs": 2, "batch_size": 4, "optimiser": optimiser(3e-4)}
    text = str(fetch("moby-dick") / "data.txt")
    return DistillRecipe.model_validate(
        {
            "metadata": {"title": "six layers of SmolLM2", "description": "benchmarks/distill/language.py"},
            "task": "text-generation",
            "data": {"source": text, "max_length": 64, "limit": 240, "validation_share": 0.15},
            "teacher": {"model": str(model)},
            "mcmi": {
                "strengths": [STRENGTH], "epochs": 1, "batch_size": 4, "optimiser": optimiser(1e-5), "row_memory": 400
            },
            "student": {
                "model": str(model), "layers": 6, "training": training,
                "frameworks": [{"name": "kd", "cross_entropy": 0.1, "soft_targets": 0.9, "temperature": 2.0}],
            },
            "seeds": SEEDS,
        }
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("/tmp/calib-distill-language"))
    work = parser.parse_args().work
    folder = work / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.process_time()

    def say(line: str) -> None:
        print(line, flush=True)

    report = run_recipe(recipe(fetch("smollm2")), folder, device="cpu", progress=say, work=work / "held")
    rows: dict[str, list[StudentRow]] = {}
    for row in report.students:
        rows.setdefault(row.teacher, []).append(row)
    write(
        "distill_language",
        {
            "model": "SmolLM2-135M-Instruct (dequantized from Q4_1)",
            "student": "its embedding, first 6 of 30 layers, norm and head",
            "text": "Moby-Dick",
            "data": report.data | {"source": "moby-dick"},
            "strength": STRENGTH,
            "seeds": len(SEEDS),
            "interval": "95 % (Student's t), pairs of one seed",
            "teachers": [row.model_dump() for row in report.teachers],
            "students": {
                teacher: {
                    "accuracy_percent": mean_interval([100 * one.accuracy for one in found], digits=2),
                    "perplexity": mean_interval([math.exp(-nats(one)) for one in found], digits=2),
                }
                for teacher, found in rows.items()
            },
            "mcmi_minus": {
                rival: {
                    "accuracy_points": difference(rows["mcmi"], rows[rival], lambda one: 100 * one.accuracy),
                    "log_likelihood_nats": difference(rows["mcmi"], rows[rival], nats),
                }
                for rival in rows
                if rival != "mcmi"
            },
            "cpu_seconds_of_this_run": round(time.process_time() - begin, 1),
        },
    )


def nats(row: StudentRow) -> float:
    assert row.log_likelihood is not None
    return row.log_likelihood


def difference(ours: list[StudentRow], theirs: list[StudentRow], of: Any) -> dict[str, Any]:
    assert [one.seed for one in ours] == [one.seed for one in theirs]
    return mean_interval([of(a) - of(b) for a, b in zip(ours, theirs, strict=True)], digits=4)


if __name__ == "__main__":
    main()
