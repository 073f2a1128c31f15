# SPDX-License-Identifier: Apache-2.0
"""One table: frameworks of distillation by teacher, MCMI beside the teacher as trained and beside its control.

`python benchmarks/distill/frameworks.py` writes `results/distill_frameworks.json`. Fashion-MNIST, all training data, 5
seeds, each framework with the weights of its paper; all eleven of the MCMI paper.
"""

from __future__ import annotations

from typing import Any

import torch
from image_data import ABOUT as DATA
from image_data import image_data
from image_students import ABOUT, STEPS, chosen_strength, points, student
from image_teachers import ABOUT as TEACHER
from paired import mean_interval
from results_file import write

SEEDS = range(5)
FRAMEWORKS = ("kd", "at", "pkt", "sp", "cc", "rkd", "vid", "crd", "dkd", "reviewkd", "hsakd")


def main() -> None:
    print("budget: 25 minutes on one core; finished teachers and students are kept", flush=True)
    strength, choice = chosen_strength("fashion-mnist", SEEDS)
    teachers: dict[str, float | None] = {"mcmi": strength, "mll": None, "control": 0.0}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in SEEDS:
        data = image_data("fashion-mnist", seed)
        for framework in FRAMEWORKS:
            for name, source in teachers.items():
                rows.setdefault((framework, name), []).append(student(data, source, framework))
    gains = {
        rival: {name: points(rows[name, "mcmi"], rows[name, rival]) for name in FRAMEWORKS}
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
                for framework in FRAMEWORKS
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
    main()
