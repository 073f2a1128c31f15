# SPDX-License-Identifier: Apache-2.0
"""Students trained for quantization beside the same students trained without, on Fashion-MNIST.

`python benchmarks/distill/quantization_friendly.py` writes `results/distill_quantization_friendly.json`. One MCMI
teacher (ResNet8, seed 0) for all; each seed changes the student's first weights and the order of its data. A small
vision transformer of four layers learns from it by soft targets, in arms that differ in nothing else: five seeds plain,
friendly and with other forms of attention, three for the parts of friendly. Debian's package dataset-fashion-mnist has
the data (FASHION_MNIST names another folder). Budget: 25 minutes on one core; a finished run is kept.

Targets: peak / rms at the worst site at least 5 times lower, INT8 static drop at most 0.2 points, the drop with INT4
weights and INT8 activations halved.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from deployed_row import deployed_row
from finished_runs import FinishedRuns
from paired import mean_interval
from results_file import write

from calib.distill import StudentSettings, TeacherSettings, fine_tune, train_student
from calib.distill.classifier import Classifier
from calib.distill.cmi import measure_information
from calib.distill.data import read_records, split_off, stratified_share
from calib.distill.networks import make_network
from calib.distill.optimiser import OptimiserSettings
from calib.distill.quantized import FakeQuantization, PeakControl
from calib.distill.quantized.deployment import deploy
from calib.distill.task import ClassificationTask
from calib.schema.distill import ImageInput

SOURCE = os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist")
TRAIN, CALIBRATION, EPOCHS = 6000, 512, 6
SEEDS, SEEDS_OF_PARTS = 5, 3
IMAGE = ImageInput(size=28, channels=1, mean=[0.286], std=[0.353])
STUDENT = OptimiserSettings("adamw", 2e-3, 0.05, schedule="cosine")
PEAK, FAKE = PeakControl("peak_to_mean", 0.05), FakeQuantization(weight_bits=4, activation_bits=8, step="lsq")
ARMS: dict[str, tuple[str, FakeQuantization | None, PeakControl | None]] = {
    "plain": ("vit_micro", None, None),
    "friendly": ("vit_micro", FAKE, PEAK),
    "fake quantization only": ("vit_micro", FAKE, None),
    "peak term only": ("vit_micro", None, PEAK),
    "clipped softmax": ("vit_micro_clipped", None, None),
    "gated attention": ("vit_micro_gated", None, None),
}


def main(arms: list[str]) -> None:
    print("budget: about 25 minutes on one core; finished runs are kept", flush=True)
    records, test = read_records(SOURCE, "train"), read_records(SOURCE, "test")
    parts = split_off(records.select(stratified_share(records.labels, 10_000 / len(records))), 0.1)
    train = parts.train.select(stratified_share(parts.train.labels, TRAIN / len(parts.train)))
    finished = FinishedRuns("distill_quantization_friendly")
    teacher, about = made_teacher(parts.train, test)
    rows = [
        finished.of(
            {"arm": arm, "how": str(ARMS[arm]), "seed": seed, "train": TRAIN, "epochs": EPOCHS, "teacher": about},
            lambda arm=arm, seed=seed: {"arm": arm, "seed": seed, **one_student(arm, seed, teacher, train, test)},
        )
        for seed in range(SEEDS)
        for arm in arms
        if seed < (SEEDS_OF_PARTS if arm.endswith("only") else SEEDS)
    ]
    write(
        "distill_quantization_friendly",
        {
            "data": {"source": "Fashion-MNIST", "train": len(train), "test": len(test), "calibration": CALIBRATION},
            "student": {"epochs": EPOCHS, "batch_size": 64, "optimiser": str(STUDENT), "framework": "kd"},
            "teacher": about,
            "arms": {name: str(ARMS[name]) for name in arms},
            "targets": {"peak_ratio": 5, "int8_drop_points": 0.2, "int4_drop_ratio": 0.5},
            "against_plain": {arm: compared(rows, arm) for arm in arms},
            "rows": rows,
        },
    )


def made_teacher(train: Any, test: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A ResNet8, trained, then fine-tuned to MCMI."""
    torch.manual_seed(0)
    found = classifier("resnet8")
    loader = found.batches(train, 64, shuffle=True, drop_last=True)
    begin = time.process_time()
    train_student(
        found.model, None, loader, "ce", StudentSettings(epochs=3, optimiser=OptimiserSettings("adamw", 1e-2))
    )
    tuning = OptimiserSettings("adamw", 1e-3, schedule="cosine")
    fine_tune(found.model, loader, TeacherSettings(strength=0.25, epochs=1, optimiser=tuning))
    print(f"teacher: {time.process_time() - begin:.0f} s", flush=True)
    accuracy = measure_information(found.model, found.batches(test))[0].summary().accuracy
    return found.model, {"network": "resnet8", "lambda": 0.25, "samples": len(train), "accuracy": accuracy}


def classifier(network: str) -> Classifier:
    model = make_network(network, 10, channels=1, size=28)
    return Classifier(model, "image", 10, network, ClassificationTask(), image=IMAGE)


def one_student(arm: str, seed: int, teacher: torch.nn.Module, train: Any, test: Any) -> dict[str, Any]:
    network, fake, peaks = ARMS[arm]
    torch.manual_seed(seed)
    student = classifier(network)
    settings = StudentSettings(epochs=EPOCHS, optimiser=STUDENT, seed=seed, quantization=fake, peaks=peaks)
    begin = time.process_time()
    loader = student.batches(train, 64, shuffle=True, drop_last=True)
    run = train_student(student.model, teacher, loader, "kd", settings)
    seconds = time.process_time() - begin
    some = train.select(stratified_share(train.labels, CALIBRATION / len(train), seed))
    found = deploy(
        student.model, student.task, student.batches(some), student.batches(test), name=network, learned=run.plan
    ).record
    row = deployed_row(found, seconds)
    print(arm, seed, row, flush=True)
    return row


def compared(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """An arm against the plain one, paired by seed; accuracy and drops in points."""
    mine = {row["seed"]: row for row in rows if row["arm"] == arm}
    plain = {row["seed"]: row for row in rows if row["arm"] == "plain"}
    seeds = sorted(mine)

    def drop(row: dict[str, Any], bits: int, scales: str = "measured") -> float:
        return 100 * (row["float"] - row[f"w{bits}a8 {scales}"])

    found: dict[str, Any] = {
        "worst_peak": mean_interval([mine[s]["worst_peak"] for s in seeds]),
        "worst_peak_of_plain_over_this": mean_interval([plain[s]["worst_peak"] / mine[s]["worst_peak"] for s in seeds]),
        "float_accuracy": mean_interval([100 * mine[s]["float"] for s in seeds]),
        "float_gain_points": mean_interval([100 * (mine[s]["float"] - plain[s]["float"]) for s in seeds]),
        "int8_drop_points": mean_interval([drop(mine[s], 8) for s in seeds]),
        "int4_weights_drop_points": mean_interval([drop(mine[s], 4) for s in seeds]),
        "int4_weights_drop_less_than_plain": mean_interval([drop(plain[s], 4) - drop(mine[s], 4) for s in seeds]),
        "cpu_seconds": mean_interval([mine[s]["cpu_seconds"] for s in seeds], digits=1),
    }
    if "w4a8 learned" in mine[seeds[0]]:
        found["int4_weights_drop_points_as_trained"] = mean_interval([drop(mine[s], 4, "learned") for s in seeds])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="plain must be among them")
    main(parser.parse_args().arms)
