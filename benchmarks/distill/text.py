# SPDX-License-Identifier: Apache-2.0
"""MiniLM with a head for eight topics of Reuters teaches its own first two layers, which are then quantized.

`python benchmarks/distill/text.py train` trains: one teacher (MiniLM, six layers, fine-tuned by log-likelihood) for
all; each seed changes the student's head and the order of its data; each student is trained plainly and for
quantization. `python benchmarks/distill/text.py speed` times the graphs of teacher and student in ONNX Runtime, on a
quiet machine. Both write into `results/distill_text.json`. Budget: 15 minutes and 1 minute on one core; a finished run
is kept and not repeated. The first 32 tokens of a document are read; the documents come out of a package at run time
and are no part of the project.

Targets: the INT8 student within 1 point of the float teacher, and at least 3 times as fast.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from assets import fetch
from deployed_row import deployed_row
from finished_runs import FinishedRuns
from paired import mean_interval
from results_file import RESULTS, median_interval, write
from reuters import Topics, topics
from torch import Tensor, nn

from calib.distill import StudentSettings, measure_information, train_student
from calib.distill.classifier import Classifier
from calib.distill.data import Records
from calib.distill.encoder import EncoderClassifier, shortened
from calib.distill.optimiser import OptimiserSettings
from calib.distill.quantized import FakeQuantization, PeakControl
from calib.distill.quantized.deployment import deploy
from calib.distill.quantized.latency import int8_graph, onnx_student
from calib.distill.task import ClassificationTask
from calib.export.onnx_graph import float_graph, save_onnx
from calib.export.onnx_lint import session
from calib.models import open_model

NAME = "distill_text"
TRAIN, TEST, CALIBRATION, TOKENS, LAYERS = 480, 400, 128, 32, 2
TEACHER = StudentSettings(epochs=2, optimiser=OptimiserSettings("adamw", 1e-4, 0.01, schedule="cosine"))
EPOCHS, STUDENT = 3, OptimiserSettings("adamw", 3e-4, 0.01, schedule="cosine")
ARMS: dict[str, tuple[FakeQuantization | None, PeakControl | None]] = {
    "plain": (None, None),
    "friendly": (FakeQuantization(weight_bits=8, activation_bits=8, step="lsq"), PeakControl("peak", 0.05)),
}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["train", "speed"])
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    part = given.part
    held = json.loads((RESULTS / f"{NAME}.json").read_text()) if (RESULTS / f"{NAME}.json").exists() else {}
    kept = {key: held[key] for key in ("train", "speed") if key in held}
    for found in train(given.seeds) if part == "train" else [speed()]:
        write(NAME, {**kept, part: found})


def train(seeds: int) -> Iterator[dict[str, Any]]:
    """What is known after each seed."""
    print("budget: about 15 minutes on one core; finished runs are kept", flush=True)
    texts = [records(part, name) for part, name in zip(topics(TRAIN, TEST), ("train", "test"), strict=True)]
    finished = FinishedRuns(NAME)
    teacher, about = made_teacher(*texts)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for arm, how in ARMS.items():
            key = {
                "arm": arm,
                "how": str(how),
                "seed": seed,
                "epochs": EPOCHS,
                "layers": LAYERS,
                "teacher": about,
            }
            rows.append(finished.of(key, lambda arm=arm, seed=seed: one_student(arm, seed, teacher, *texts)))
            rows[-1] = {"arm": arm, "seed": seed, **rows[-1]}
        yield {
            "data": {
                "source": "Reuters-R8",
                "train": TRAIN,
                "test": TEST,
                "tokens": TOKENS,
                "calibration": CALIBRATION,
            },
            "teacher": about,
            "student": {"layers": LAYERS, "epochs": EPOCHS, "optimiser": str(STUDENT), "framework": "kd"},
            "arms": {name: str(how) for name, how in ARMS.items()},
            "targets": {"int8_within_points_of_teacher": 1, "peak_ratio": 5},
            "compared": {arm: compared(rows, arm, about["accuracy"]) for arm in ARMS},
            "rows": rows,
        }


def records(part: Topics, name: str) -> Records:
    return Records(part.texts, tuple(int(label) for label in part.labels), tuple(map(str, range(8))), f"R8 {name}")


def classifier(layers: int | None) -> Classifier:
    opened = open_model(fetch("minilm"), task="feature-extraction", device="cpu", dtype="float32")
    encoder = opened.model if layers is None else shortened(opened.model, layers)
    model = EncoderClassifier(encoder, 8)
    name = f"MiniLM, {layers or 6} layers"
    return Classifier(model, "text", 8, name, ClassificationTask(), tokenizer=opened.tokenizer, max_length=TOKENS)


class Remembering(nn.Module):
    """A frozen teacher that computes each document once: it sees the same ones in every epoch of every student."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.known = model, {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        keys = [bytes(row[mask.bool()].numpy()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        if any(key not in self.known for key in keys):
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask)
            self.known.update(zip(keys, logits.detach(), strict=True))
        return torch.stack([self.known[key] for key in keys])


def made_teacher(train: Records, test: Records) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    found = classifier(None)
    loader = found.batches(train, 16, shuffle=True, drop_last=True)
    train_student(found.model, None, loader, "ce", TEACHER, progress=lambda line: print(line, flush=True))
    accuracy = measure_information(found.model, found.batches(test, 50))[0].summary().accuracy
    about = {"model": "all-MiniLM-L6-v2", "layers": 6, "trained_by": str(TEACHER), "accuracy": accuracy}
    print(about, flush=True)
    return Remembering(found.model), about


def one_student(arm: str, seed: int, teacher: nn.Module, train: Records, test: Records) -> dict[str, Any]:
    fake, peaks = ARMS[arm]
    torch.manual_seed(seed)
    student = classifier(LAYERS)
    settings = StudentSettings(epochs=EPOCHS, optimiser=STUDENT, seed=seed, quantization=fake, peaks=peaks)
    begin = time.process_time()
    run = train_student(
        student.model, teacher, student.batches(train, 16, shuffle=True, drop_last=True), "kd", settings
    )
    seconds = time.process_time() - begin
    some = train.select(range(CALIBRATION))
    found = deploy(
        student.model,
        student.task,
        student.batches(some, 32),
        student.batches(test, 50),
        name=student.name,
        learned=run.plan,
    )
    in_graph = in_onnxruntime(student, found.scales, test)
    row = {**deployed_row(found.record, seconds), "onnxruntime int8": in_graph}
    print(arm, seed, row, flush=True)
    return row


def in_onnxruntime(student: Classifier, scales: Any, test: Records) -> float:
    """Accuracy of the exported INT8 graph where it really runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        int8_graph(onnx_student(student.model, scales.model), scales, path)
        held = session(path, threads=1)
        right = 0
        for batch in student.batches(test, 50):
            feed = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
            right += int((held.run(None, feed)[0].argmax(-1) == batch["labels"].numpy()).sum())
    return right / len(test)


def compared(rows: list[dict[str, Any]], arm: str, teacher: float) -> dict[str, Any]:
    mine = {row["seed"]: row for row in rows if row["arm"] == arm}
    plain = {row["seed"]: row for row in rows if row["arm"] == "plain"}
    seeds = sorted(mine)
    return {
        "int8_minus_teacher_points": mean_interval([100 * (mine[s]["onnxruntime int8"] - teacher) for s in seeds]),
        "float_minus_teacher_points": mean_interval([100 * (mine[s]["float"] - teacher) for s in seeds]),
        "int8_drop_points": mean_interval([100 * (mine[s]["float"] - mine[s]["w8a8 measured"]) for s in seeds]),
        "int4_weights_drop_points": mean_interval([100 * (mine[s]["float"] - mine[s]["w4a8 measured"]) for s in seeds]),
        "worst_peak": mean_interval([mine[s]["worst_peak"] for s in seeds]),
        "worst_peak_of_plain_over_this": mean_interval([plain[s]["worst_peak"] / mine[s]["worst_peak"] for s in seeds]),
    }


def speed() -> dict[str, Any]:
    """CPU time of the float teacher over that of the student, alternating runs, one thread, one document.

    Weights are as they were before any training: what is timed does not depend on them.
    """
    teacher, student = classifier(None), classifier(LAYERS)
    some = records(topics(TRAIN, TEST)[0], "train").select(range(16))
    found = deploy(student.model, student.task, student.batches(some, 16), student.batches(some, 16))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("teacher", "student", "int8")}
        save_onnx(float_graph(onnx_student(teacher.model, found.scales.model)).model, paths["teacher"])
        save_onnx(float_graph(onnx_student(student.model, found.scales.model)).model, paths["student"])
        integer = int8_graph(onnx_student(student.model, found.scales.model), found.scales, paths["int8"])
        runs = {name: session(path, threads=1) for name, path in paths.items()}
        for tokens in (32, 128):
            ids = np.random.default_rng(0).integers(1000, 20_000, (1, tokens))
            feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for number in range(-3, 41):
                for name, run in runs.items():
                    begin = time.process_time()
                    for _ in range(3):
                        run.run(None, feed)
                    if number >= 0:
                        times[name].append((time.process_time() - begin) / 3)
            results[f"{tokens} tokens"] = {
                "ms": {name: median_interval([1000 * t for t in held]) for name, held in times.items()},
                "float_teacher_over_int8_student": ratio(times["teacher"], times["int8"]),
                "float_teacher_over_float_student": ratio(times["teacher"], times["student"]),
            }
    return {"threads": 1, "integer_layers": len(integer), "target": 3, **results}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    return median_interval([a / b for a, b in zip(slow, fast, strict=True)])


if __name__ == "__main__":
    main()
