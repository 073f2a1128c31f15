# SPDX-License-Identifier: Apache-2.0
"""Where teachers look: Eigen-CAM maps of the MCMI teacher beside the teacher as trained and the control.

`python benchmarks/distill/eigen_cam.py [--picture FILE.png]` writes `results/distill_eigen_cam.json`: the mean share of
pixels above half the maximum, over 500 test images of Fashion-MNIST, 5 seeds. The last maps have 4 x 4 values.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from image_data import ABOUT as DATA
from image_data import image_data, loader
from image_students import chosen_strength
from image_teachers import ABOUT, STRENGTHS, teacher
from paired import mean_interval
from results_file import write

from calib.distill import ClassificationTask
from calib.distill.data import stratified_share
from calib.distill.protocols import compare_cams
from calib.distill.protocols.eigencam import save_cams

SEEDS, IMAGES, SHOWN = range(5), 500, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Eigen-CAM maps of MCMI teachers.")
    parser.add_argument("--picture", type=Path, help="where to write the maps of the first seed")
    picture = parser.parse_args().picture
    strength, choice = chosen_strength("fashion-mnist", SEEDS)
    names = {"mll": None, **{f"lambda {s:g}": s for s in STRENGTHS}}
    area: dict[str, list[float]] = {name: [] for name in names}
    for seed in SEEDS:
        data = image_data("fashion-mnist", seed)
        some = data.test.select(stratified_share(data.test.labels, IMAGES / len(data.test)))
        models = {name: teacher(data, lam)[0] for name, lam in names.items()}
        batch = next(iter(loader(some, len(some))))
        found = compare_cams(models, batch, ClassificationTask())
        for name, value in found.area.items():
            area[name].append(100 * value)
        if seed == SEEDS[0] and picture is not None:
            one_per_class = some.select(stratified_share(some.labels, 1 / IMAGES)[:SHOWN])
            few = next(iter(loader(one_per_class, SHOWN)))
            three = {name: models[name] for name in ("mll", "lambda 0", f"lambda {strength:g}")}
            save_cams(picture, few[0], compare_cams(three, few, ClassificationTask()), scale=6)
    pairs = {
        f"lambda {s:g}": {
            rival: mean_interval([a - b for a, b in zip(area[f"lambda {s:g}"], area[rival], strict=True)], digits=2)
            for rival in ("mll", "lambda 0")
        }
        for s in STRENGTHS
        if s > 0
    }
    write(
        "distill_eigen_cam",
        {
            "data": DATA["fashion-mnist"],
            "teacher": ABOUT,
            "seeds": len(SEEDS),
            "interval": "95 % (Student's t), percent of the pixels, pairs of one seed",
            "choice": choice,
            "covered_area": {name: mean_interval(values, digits=2) for name, values in area.items()},
            "minus": pairs,
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
