# SPDX-License-Identifier: Apache-2.0
"""Students of an MCMI teacher beside those of the teacher as trained, of its control, and of none; four data sizes.

`python benchmarks/distill/few_shot.py [--images M] [--steps N]` writes `results/distill_few_shot.json`, or with other
numbers than 5,000 and 200 `results/distill_few_shot_M_images_N_steps.json`. Fashion-MNIST, 5 seeds, framework kd.
The published claim: at least as good at each size, and most at few samples.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from image_data import DRAWN, about_fashion, image_data
from image_students import ABOUT, STEPS, chosen_strength, points, student
from image_teachers import ABOUT as TEACHER
from paired import mean_interval
from results_file import write

SEEDS, SHARES, IMAGES = range(5), (1.0, 0.25, 0.1, 0.05), DRAWN["fashion-mnist"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Students of MCMI teachers at four data sizes.")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the optimiser, for every student")
    parser.add_argument("--images", type=int, default=IMAGES, help="for training and validation")
    given = parser.parse_args()
    steps, images = given.steps, given.images
    minutes = 3 * steps // 100 + (0 if images == IMAGES else images // 1000)
    print(f"budget: {minutes} minutes on one core after teachers.py; what is finished is kept", flush=True)
    strength, choice = chosen_strength("fashion-mnist", SEEDS, steps, images)
    teachers: dict[str, float | str | None] = {"mcmi": strength, "mll": None, "control": 0.0, "none": "none"}
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in SEEDS:
        data = image_data("fashion-mnist", seed, images)
        for share in SHARES:
            for name, source in teachers.items():
                framework = "ce" if name == "none" else "kd"
                rows.setdefault((name, share), []).append(student(data, source, framework, share, steps=steps))
    other = [f"{images}_images"] * (images != IMAGES) + [f"{steps}_steps"] * (steps != STEPS)
    write(
        "_".join(["distill_few_shot", *other]),
        {
            "data": about_fashion(images),
            "teacher": TEACHER,
            "student": ABOUT,
            "steps": steps,
            "seeds": len(SEEDS),
            "interval": "95 % (Student's t), percentage points, pairs of one seed",
            "choice": choice,
            "by_share": {
                f"{100 * share:g} %": {
                    "samples": rows["mcmi", share][0]["samples"],
                    "accuracy": {
                        name: mean_interval([100 * row["accuracy"] for row in rows[name, share]], digits=2)
                        for name in teachers
                    },
                    "mcmi_minus": {
                        name: points(rows["mcmi", share], rows[name, share]) for name in ("mll", "control", "none")
                    },
                }
                for share in SHARES
            },
            "rows": [row for found in rows.values() for row in found],
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
