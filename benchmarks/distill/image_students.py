# SPDX-License-Identifier: Apache-2.0
"""Students of images: a net of three convolutions, equally many steps whatever the data; kept when finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from finished_runs import FinishedRuns
from image_data import ImageData, image_data, loader
from image_teachers import STRENGTHS, TRAINING, TUNING, Strength, key_of, teacher
from paired import mean_interval
from torch import nn

from calib.distill import StudentSettings, measure_information, train_student
from calib.distill.optimiser import OptimiserSettings
from calib.distill.protocols import few_shot_conditions, without_classes, zero_shot_result

SETTINGS = StudentSettings(epochs=5, auxiliary_epochs=1, optimiser=OptimiserSettings("sgd", 0.05, schedule="cosine"))
STEPS = 200
WIDTHS = (8, 16, 32)
ABOUT = (
    "three 3 x 3 convolutions of 8, 16 and 32 channels with batch normalisation, 6,274 parameters; batches of 64, SGD "
    "0.05, cosine, no augmentation; accuracy on test data after the last step"
)
CHOICE_SHARE = 0.1
CHOICE = (
    "one lambda for all seeds: that with the highest mean validation accuracy of kd students on 10 % of the data; "
    "validation data only"
)


def network() -> nn.Module:
    """A student with fresh weights: three stages, each at half the resolution of that before."""

    def stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    first, second, third = WIDTHS
    return nn.Sequential(
        stage(1, first),
        nn.MaxPool2d(2),
        stage(first, second),
        nn.MaxPool2d(2),
        stage(second, third),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, 10),
    )


def student(
    data: ImageData,
    strength: Strength | str,
    framework: str,
    share: float = 1.0,
    omitted: Sequence[int] = (),
    *,
    steps: int = STEPS,
) -> dict[str, Any]:
    """The row of one student.

    Args:
        data: of one seed.
        strength: lambda of the teacher, None for that trained by log-likelihood, "none" for no teacher.
        framework: "ce" without a teacher.
        share: of the training data.
        omitted: classes that the student never sees.
        steps: of the optimiser, a multiple of 5.
    """
    key = {
        "data": data.name,
        "samples": len(data.train),
        "seed": data.seed,
        "teacher": [strength, key_of(TRAINING), key_of(TUNING)],
        "student": [key_of(SETTINGS), steps // SETTINGS.epochs, WIDTHS],
        "framework": framework,
        "share": share,
        "omitted": list(omitted),
    }
    return FinishedRuns("distill_image_students").of(
        key, lambda: _trained(data, strength, framework, share, list(omitted), steps)
    )


def _trained(
    data: ImageData, strength: Strength | str, framework: str, share: float, omitted: list[int], steps: int
) -> dict[str, Any]:
    records = data.train if share == 1 else few_shot_conditions(data.train, [share], data.seed)[0].records
    if omitted:
        records, _ = without_classes(records, omitted)
    source = None if isinstance(strength, str) else teacher(data, strength)[0]
    torch.manual_seed(data.seed)
    model = network()
    settings = replace(SETTINGS, seed=data.seed, steps_per_epoch=steps // SETTINGS.epochs)
    begin = time.process_time()
    train_student(model, source, loader(records, train=True), framework, settings)
    seconds = time.process_time() - begin
    row: dict[str, Any] = {
        "seed": data.seed,
        "teacher": strength,
        "framework": framework,
        "share": share,
        "samples": len(records),
        "cpu_seconds": round(seconds, 1),
    }
    test = loader(data.test, 256)
    if omitted:
        found = zero_shot_result(model, test, omitted)
        row |= {"omitted": omitted, "omitted_recall": found.omitted_recall, "kept_accuracy": found.kept_accuracy}
        row["confusion"] = found.confusion.tolist()
    else:
        for split, batches in (("validation", loader(data.validation, 256)), ("accuracy", test)):
            row[split] = measure_information(model, batches, separation=False)[0].summary().accuracy
    print({name: value for name, value in row.items() if name != "confusion"}, flush=True)
    return row


def chosen_strength(
    name: str, seeds: Sequence[int], steps: int = STEPS, images: int | None = None
) -> tuple[float, dict[str, Any]]:
    """Lambda above 0 by validation accuracy, and that accuracy of each."""
    tried: dict[float, list[float]] = {s: [] for s in STRENGTHS if s > 0}
    for seed in seeds:
        data = image_data(name, seed, images)
        for strength, values in tried.items():
            values.append(100 * student(data, strength, "kd", CHOICE_SHARE, steps=steps)["validation"])
    best = max(tried, key=lambda s: sum(tried[s]))
    table = {f"{s:g}": mean_interval(values, digits=2) for s, values in tried.items()}
    return best, {"lambda": best, "how": CHOICE, "validation_accuracy": table}


def points(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], value: str = "accuracy") -> dict[str, Any]:
    """Mean difference in percentage points, paired by seed, with its interval."""
    rival = {row["seed"]: row[value] for row in theirs}
    return mean_interval([100 * (row[value] - rival[row["seed"]]) for row in mine], digits=2)
