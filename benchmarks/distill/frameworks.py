# SPDX-License-Identifier: Apache-2.0
"""One table: frameworks of distillation by teacher, MCMI beside the teacher as trained and beside its control.

`python benchmarks/distill/frameworks.py` writes `results/distill_frameworks.json`. Fashion-MNIST, all training data, 3
seeds, each framework with the weights of its paper; all eleven of the MCMI paper. A student by crd takes two minutes,
the others seconds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from image_data import ABOUT as DATA
from image_data import image_data
from image_students import ABOUT, STEPS, chosen_strength, points, student
from image_teachers import ABOUT as TEACHER
from paired import mean_interval
from results_file import write

SEEDS, CHOOSING_SEEDS = range(3), range(5)
FRAMEWORKS = ("kd", "at", "pkt", "sp", "cc", "rkd", "vid", "crd", "dkd", "reviewkd", "hsakd")


def main(frameworks: list[str]) -> None:
    print("budget: 40 minutes on one core; finished teachers and students are kept", flush=True)
    strength, choice = chosen_strength("fashion-mnist", CHOOSING_SEEDS)
    teachers: dict[str, float | None] = {"mcmi": strength, "mll": None, "control": 0.0}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in SEEDS:
        data = image_data("fashion-mnist", seed)
        for framework in frameworks:
            for name, source in teachers.items():
                rows.setdefault((framework, name), []).append(student(data, source, framework))
    gains = {
        rival: {name: points(rows[name, "mcmi"], rows[name, rival]) for name in frameworks}
        for rival in ("mll", "control")
    }
    write(
        "distill_frameworks",
        {
            "data": DATA["fashion-mnist"],
            "teacher": TEACHER,
            "student": ABOUT,
            "steps": STEPS,
            "seeds": len(SEEDS),
            "interval": "95 % (Student's t), percent and percentage points, pairs of one seed",
            "choice": choice,
            "accuracy": {
                framework: {
                    name: mean_interval([100 * row["accuracy"] for row in rows[framework, name]], digits=2)
                    for name in teachers
                }
                for framework in frameworks
            },
            "mcmi_minus": gains,
            "over_frameworks": {
                rival: {
                    "mean_gain": mean_interval([found["mean"] for found in by_name.values()], digits=2),
                    "frameworks_with_a_positive_mean": sum(found["mean"] > 0 for found in by_name.values()),
                    "frameworks": len(by_name),
                }
                for rival, by_name in gains.items()
            },
            "rows": [row for found in rows.values() for row in found],
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    main(parser.parse_args().frameworks)
