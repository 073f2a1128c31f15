# SPDX-License-Identifier: Apache-2.0
"""Classes that a student never sees, neither image nor label: how many of them does it recognise by its teacher alone?

`python benchmarks/distill/zero_shot.py [--data fashion-mnist|mnist-5k]` writes `results/distill_zero_shot_DATA.json`.
5 seeds, framework kd at T = 4. On MNIST lambda is the one chosen on Fashion-MNIST: no validation accuracy tells which
teacher helps with classes that are not there.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from image_data import ABOUT as DATA
from image_data import image_data
from image_students import ABOUT, STEPS, chosen_strength, points, student
from image_teachers import ABOUT as TEACHER
from image_teachers import teacher as made_teacher
from paired import mean_interval
from results_file import write

SEEDS, OMITTED = range(5), ((9,), (9, 7, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description="Zero-shot students of MCMI teachers.")
    parser.add_argument("--data", choices=sorted(DATA), default="fashion-mnist")
    name = parser.parse_args().data
    print("budget: 5 minutes on one core after few_shot.py; finished students are kept", flush=True)
    strength, choice = chosen_strength("fashion-mnist", SEEDS)
    teachers: dict[str, float | str | None] = {"mcmi": strength, "mll": None, "control": 0.0, "none": "none"}
    rows: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for seed in SEEDS:
        data = image_data(name, seed)
        for omitted in OMITTED:
            for teacher, source in teachers.items():
                framework = "ce" if teacher == "none" else "kd"
                row = student(data, source, framework, omitted=omitted)
                rows.setdefault((teacher, omitted), []).append(row)
    write(
        f"distill_zero_shot_{name.replace('-', '_')}",
        {
            "data": DATA[name],
            "teacher": TEACHER,
            "student": ABOUT,
            "steps": STEPS,
            "seeds": len(SEEDS),
            "interval": "95 % (Student's t), percent and percentage points, pairs of one seed",
            "choice": choice,
            "by_omitted_classes": {
                " ".join(map(str, omitted)): {
                    value: {
                        **{
                            teacher: mean_interval([100 * row[value] for row in rows[teacher, omitted]], digits=2)
                            for teacher in teachers
                        },
                        "mcmi_minus": {
                            rival: points(rows["mcmi", omitted], rows[rival, omitted], value)
                            for rival in ("mll", "control", "none")
                        },
                    }
                    for value in ("omitted_recall", "kept_accuracy")
                }
                for omitted in OMITTED
            },
            "teachers": [
                made_teacher(image_data(name, seed), source)[1] for seed in SEEDS for source in (None, 0.0, strength)
            ],
            "rows": [row for found in rows.values() for row in found],
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
