# SPDX-License-Identifier: Apache-2.0
"""MiniLM with a head for the eight topics of Reuters-R8 teaches a student of its first layers, which is quantized.

Four parts, each of which writes its own key of `results/distill_text.json` and can be run alone:

* `python benchmarks/distill/text.py choose`: plain students and shares of the peak term, on validation data.
* `python benchmarks/distill/text.py train`: 5 seeds with what was chosen, plain and for quantization, judged on test
  data. Seeds change the student's head and the order of its data; they share the teacher.
* `python benchmarks/distill/text.py teachers`: plain students of the same seeds by an MCMI teacher and by its control
  with lambda = 0, whose first layers they start from, beside those of the teacher by log-likelihood.
* `python benchmarks/distill/text.py speed`: teacher and student in ONNX Runtime, on a quiet machine.

The first 32 tokens of a document are read; the documents come out of a package at run time and are no part of the
project. Budget: 20, 35, 30 and 1 minutes on one core (a student takes about 2.5), and 6 for a teacher; what is finished
is kept and not repeated.

Targets: the INT8 student within 1 point of the float teacher, and at least 3 times as fast; peak / rms at the worst
site 5 times lower than that of the plain student.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from deployed_row import deployed_row
from finished_runs import FinishedRuns
from paired import mean_interval
from results_file import RESULTS, median_interval, write
from text_teachers import (
    BATCH,
    TOKENS,
    TRAINING,
    TUNING,
    VALIDATION,
    Remembering,
    Strength,
    minilm,
    teacher,
    text_data,
)

from calib.distill import StudentSettings, train_student
from calib.distill.classifier import Classifier
from calib.distill.data import Records, stratified_share
from calib.distill.encoder import EncoderClassifier, shortened
from calib.distill.optimiser import OptimiserSettings
from calib.distill.quantized import FakeQuantization, PeakControl
from calib.distill.quantized.deployment import deploy
from calib.distill.quantized.latency import int8_graph, onnx_student
from calib.export.onnx_graph import float_graph, save_onnx
from calib.export.onnx_lint import session

NAME, CALIBRATION, CHOOSING_SEED = "distill_text", 128, 100
SITES = ("linear_input", "linear_output", "residual", "attention_output", "mlp_output")
FAKE = FakeQuantization(weight_bits=8, activation_bits=8, step="lsq")


@dataclass(frozen=True)
class Student:
    """How a student is made.

    `start`: the layers of MiniLM as published, or of the fine-tuned teacher. `share` of the peak term; 0 is the plain
    student, in float and without a term. `teacher`: its lambda, None for that by log-likelihood.
    """

    layers: int = 2
    start: str = "teacher"
    epochs: int = 2
    learning_rate: float = 3e-4
    share: float = 0.0
    teacher: Strength = None


CHOSEN = Student()
MCMI = "MCMI teacher"
ARMS = {
    "train": {"plain": CHOSEN, "friendly": replace(CHOSEN, share=0.8)},
    "teachers": {
        "plain": CHOSEN,
        MCMI: replace(CHOSEN, teacher=0.25),
        "control teacher": replace(CHOSEN, teacher=0.0),
    },
}
TRIALS = [CHOSEN, *(replace(CHOSEN, share=share) for share in (0.2, 0.5, 0.8))]


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["choose", *ARMS, "speed"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--finished", action="store_true", help="report what is finished and train nothing")
    given = parser.parse_args()
    held = json.loads((RESULTS / f"{NAME}.json").read_text()) if (RESULTS / f"{NAME}.json").exists() else {}
    kept = {key: held[key] for key in ("choose", *ARMS, "speed") if key in held}
    if given.part == "choose":
        found_so_far = choose()
    elif given.part == "speed":
        found_so_far = iter([speed()])
    else:
        found_so_far = train(given.seeds, ARMS[given.part], given.finished)
    for found in found_so_far:
        write(NAME, {**kept, given.part: found})


def choose() -> Iterator[dict[str, Any]]:
    """What is known after each trial; only training and validation data are read."""
    data = text_data()
    rows = []
    for how in TRIALS:
        row = finished_student(how, CHOOSING_SEED, data.validation)
        rows.append({**asdict(how), "minus_teacher_points": 100 * (row["w8a8 measured"] - row["teacher"]), **row})
        yield {
            "validation": len(data.validation),
            "seed": CHOOSING_SEED,
            "rule": "the share with the lowest worst peak among those whose INT8 accuracy is at most half a point "
            "below the plain student's; the rest was set beforehand",
            "teacher_accuracy": teacher()[1]["validation"]["accuracy"],
            "trials": rows,
        }


def train(seeds: int, arms: dict[str, Student], only_finished: bool) -> Iterator[dict[str, Any]]:
    """What is known after each seed; of finished students only, if so wanted."""
    data = text_data()
    rows: list[dict[str, Any]] = []
    _, about = teacher()
    finished = FinishedRuns(NAME)
    for seed in range(seeds):
        rows += [
            {"arm": arm, "seed": seed, **finished_student(how, seed, data.test, graph=True)}
            for arm, how in arms.items()
            if not only_finished or finished.knows(key_of(how, seed, data.test))
        ]
        yield {
            "data": {
                "source": "Reuters-R8",
                "train": len(data.train),
                "validation": len(data.validation),
                "validation_share": VALIDATION,
                "test": len(data.test),
                "tokens": TOKENS,
                "calibration": CALIBRATION,
            },
            "teacher": {
                "model": "all-MiniLM-L6-v2",
                "layers": 6,
                "trained_by": f"log-likelihood, {TRAINING.epochs} epochs, {TRAINING.optimiser}, batches of {BATCH}, "
                "embedding tables left as they were",
                "tuned_by": f"{TUNING.epochs} epochs, {TUNING.optimiser}",
                "accuracy": {"test": about["test"]["accuracy"], "validation": about["validation"]["accuracy"]},
                "rows": [teacher(how.teacher)[1] for how in arms.values() if how.share == 0],
            },
            "framework": "kd: 0.1 CE + 0.9 T^2 KL, T = 4; adamw, weight decay 0.01, cosine",
            "fake_quantization": str(FAKE),
            "arms": {arm: asdict(how) for arm, how in arms.items()},
            "targets": {"int8_within_points_of_teacher": 1, "peak_ratio": 5, "int8_drop_points": 0.2},
            "interval": "95 % (Student's t); seeds change head and order, teacher and test data are the same",
            "compared": {
                arm: compared(rows, arm, about["test"]["accuracy"])
                for arm in arms
                if any(row["arm"] == arm for row in rows)
            },
            **({"mcmi_minus": {arm: gains(rows, arm) for arm in arms if arm != MCMI}} if MCMI in arms else {}),
            "rows": rows,
        }


def gains(rows: list[dict[str, Any]], rival: str) -> dict[str, Any]:
    """Students of the MCMI teacher against those of another arm, paired by seed, in points."""
    mine, theirs = ({row["seed"]: row for row in rows if row["arm"] == arm} for arm in (MCMI, rival))
    seeds = sorted(set(mine) & set(theirs))
    return {
        form: mean_interval([100 * (mine[s][key] - theirs[s][key]) for s in seeds])
        for form, key in (("float", "float"), ("int8", "onnxruntime int8"))
    }


def finished_student(how: Student, seed: int, judge: Records, *, graph: bool = False) -> dict[str, Any]:
    """The row of a student, trained now if it is not there."""
    return FinishedRuns(NAME).of(key_of(how, seed, judge), lambda: one_student(how, seed, judge, graph=graph))


def key_of(how: Student, seed: int, judge: Records) -> dict[str, Any]:
    key = {"how": asdict(how), "fake": str(FAKE), "peaks": str(peaks_of(how)), "seed": seed, "judge": judge.source}
    return key | {"samples": [len(text_data().train), len(judge)], "teacher": teacher(how.teacher)[1]}


def peaks_of(how: Student) -> PeakControl | None:
    return PeakControl("peak_to_mean", how.share, SITES) if how.share else None


def made_student(how: Student, seed: int) -> Classifier:
    """The first layers with a fresh head, embedding tables left as they are."""
    found = minilm() if how.start == "published" else teacher(how.teacher)[0]
    torch.manual_seed(seed)
    encoder: Any = shortened(deepcopy(found.model.encoder), how.layers)  # type: ignore[arg-type]
    return replace(found, model=EncoderClassifier(encoder, found.classes), name=f"MiniLM, {how.layers} layers")


def one_student(how: Student, seed: int, judge: Records, *, graph: bool) -> dict[str, Any]:
    data = text_data()
    source, about = teacher(how.teacher)
    student = made_student(how, seed)
    settings = StudentSettings(
        epochs=how.epochs,
        optimiser=OptimiserSettings("adamw", how.learning_rate, 0.01, schedule="cosine"),
        seed=seed,
        quantization=FAKE if how.share else None,
        peaks=peaks_of(how),
    )
    knows = Remembering(source, data.train, how.teacher)
    loader = student.batches(data.train, BATCH, shuffle=True, drop_last=True)
    begin = time.process_time()
    run = train_student(student.model, knows, loader, "kd", settings, progress=lambda line: print(line, flush=True))
    seconds = time.process_time() - begin
    some = data.train.select(stratified_share(data.train.labels, CALIBRATION / len(data.train), seed))
    batches = student.batches(judge, 64)
    found = deploy(student.model, student.task, student.batches(some, 32), batches, name=student.name, learned=run.plan)
    part = "validation" if judge is data.validation else "test"
    row = {**deployed_row(found.record, seconds), "teacher": about[part]["accuracy"]}
    if graph:
        row["onnxruntime int8"] = in_onnxruntime(student, found.scales, judge)
    print(how, seed, row, flush=True)
    return row


def in_onnxruntime(student: Classifier, scales: Any, test: Records) -> float:
    """Accuracy of the exported INT8 graph where it really runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        int8_graph(onnx_student(student.model, scales.model), scales, path)
        held = session(path, threads=1)
        right = 0
        for batch in student.batches(test, 64):
            feed = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
            right += int((held.run(None, feed)[0].argmax(-1) == batch["labels"].numpy()).sum())
    return right / len(test)


def compared(rows: list[dict[str, Any]], arm: str, teacher: float) -> dict[str, Any]:
    """An arm against the float teacher by log-likelihood, and against the plain arm, paired by seed; points."""
    mine = {row["seed"]: row for row in rows if row["arm"] == arm}
    plain = {row["seed"]: row for row in rows if row["arm"] == "plain"}
    seeds = sorted(mine)

    def drop(row: dict[str, Any], bits: int) -> float:
        return 100 * (row["float"] - row[f"w{bits}a8 measured"])

    return {
        "int8_accuracy": mean_interval([100 * mine[s]["onnxruntime int8"] for s in seeds]),
        "int8_minus_teacher_points": mean_interval([100 * (mine[s]["onnxruntime int8"] - teacher) for s in seeds]),
        "float_minus_teacher_points": mean_interval([100 * (mine[s]["float"] - teacher) for s in seeds]),
        "int8_gain_over_plain_points": mean_interval(
            [100 * (mine[s]["onnxruntime int8"] - plain[s]["onnxruntime int8"]) for s in seeds]
        ),
        "int8_drop_points": mean_interval([drop(mine[s], 8) for s in seeds]),
        "int4_weights_drop_points": mean_interval([drop(mine[s], 4) for s in seeds]),
        "int4_weights_drop_less_than_plain": mean_interval([drop(plain[s], 4) - drop(mine[s], 4) for s in seeds]),
        "worst_peak": mean_interval([mine[s]["worst_peak"] for s in seeds]),
        "worst_peak_of_plain_over_this": mean_interval([plain[s]["worst_peak"] / mine[s]["worst_peak"] for s in seeds]),
        "cpu_seconds": mean_interval([mine[s]["cpu_seconds"] for s in seeds], digits=1),
    }


def speed() -> dict[str, Any]:
    """CPU time of the float teacher over that of the student, alternating runs, one thread, one document.

    Weights are as they were before any training: what is timed does not depend on them.
    """
    whole, student = minilm(), made_student(replace(CHOSEN, start="published"), 0)
    some = text_data().train.select(range(16))
    found = deploy(student.model, student.task, student.batches(some, 16), student.batches(some, 16))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("teacher", "student", "int8")}
        save_onnx(float_graph(onnx_student(whole.model, found.scales.model)).model, paths["teacher"])
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
