# SPDX-License-Identifier: Apache-2.0
"""Does the CMI of a teacher rise with lambda, on the data it was tuned on and on others, and what does temperature do?

`python benchmarks/distill/teachers.py` writes `results/distill_teachers.json`. Fashion-MNIST, 5 seeds, lambda 0,
0.25, 0.5, 0.75. Target: CMI rises from lambda to lambda in every seed, on training and on test data.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from image_data import ABOUT as DATA
from image_data import image_data
from image_teachers import ABOUT, STRENGTHS, TEMPERATURES, teacher
from paired import mean_interval
from results_file import write

SEEDS = range(5)


def main() -> None:
    print("budget: 8 minutes on one core; finished teachers are kept", flush=True)
    rows = [teacher(image_data("fashion-mnist", seed), s)[1] for seed in SEEDS for s in (None, *STRENGTHS)]
    write(
        "distill_teachers",
        {
            "data": DATA["fashion-mnist"],
            "teacher": ABOUT,
            "seeds": len(SEEDS),
            "interval": "95 % (Student's t), pairs of one seed",
            "rises_with_lambda": {split: rising(rows, split) for split in ("train", "test")},
            "by_lambda": {name(s): summary(rows, s) for s in (None, *STRENGTHS)},
            "cmi_by_temperature": {
                name(s): {
                    split: {
                        f"{t:g}": mean_interval([r[split]["cmi_by_temperature"][f"{t:g}"] for r in of(rows, s)])
                        for t in TEMPERATURES
                    }
                    for split in ("train", "test")
                }
                for s in (None, *STRENGTHS)
            },
            "rows": rows,
        },
    )


def name(strength: float | None) -> str:
    return "mll" if strength is None else f"lambda {strength:g}"


def of(rows: list[dict[str, Any]], strength: float | None) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["lambda"] == strength), key=lambda row: int(row["seed"]))


def rising(rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """Per seed: the CMI at each lambda rises throughout; and from step to step, how many seeds."""
    by_seed = [[of(rows, s)[k][split]["cmi"] for s in STRENGTHS] for k in range(len(SEEDS))]
    return {
        "seeds_rising_throughout": sum(all(b > a for a, b in pairwise(values)) for values in by_seed),
        "seeds": len(by_seed),
        "seeds_rising": {
            f"{a:g} -> {b:g}": sum(values[k + 1] > values[k] for values in by_seed)
            for k, (a, b) in enumerate(pairwise(STRENGTHS))
        },
    }


def summary(rows: list[dict[str, Any]], strength: float | None) -> dict[str, Any]:
    mine, control, mll = of(rows, strength), of(rows, 0.0), of(rows, None)
    found: dict[str, Any] = {"stopped_by_guard": [row["stopped"] for row in mine if row["stopped"]]}
    for split in ("train", "test"):
        for quantity in ("cmi", "ncmi", "log_likelihood", "accuracy", "ece"):
            found[f"{split}_{quantity}"] = mean_interval([row[split][quantity] for row in mine])
        for rival, theirs in (("control", control), ("mll", mll)):
            found[f"{split}_cmi_minus_{rival}"] = mean_interval(
                [a[split]["cmi"] - b[split]["cmi"] for a, b in zip(mine, theirs, strict=True)]
            )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
