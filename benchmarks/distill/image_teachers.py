# SPDX-License-Identifier: Apache-2.0
"""Teachers of images, kept outside the repository: a narrow ResNet8 by log-likelihood, then tuned with each lambda."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from finished_runs import FinishedRuns
from image_data import ImageData, loader
from safetensors.torch import load_file, save_file
from torch import nn

from calib.distill import StudentSettings, TeacherSettings, fine_tune, measure_information, train_student
from calib.distill.networks.resnet import ResNet
from calib.distill.optimiser import OptimiserSettings

WIDTHS = (8, 8, 16, 32)
STRENGTHS = (0.0, 0.25, 0.5, 0.75)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
TRAINING = StudentSettings(epochs=8, optimiser=OptimiserSettings("sgd", 0.05, schedule="cosine"))
TUNING = TeacherSettings(epochs=3, optimiser=OptimiserSettings("sgd", 0.005, schedule="cosine"))
ABOUT = (
    "ResNet8 of half the width, batches of 64, no augmentation; 8 epochs of SGD 0.05 by log-likelihood, then 3 of SGD "
    "0.005 with lambda, cosine, centroids refreshed every epoch; the control is lambda = 0; figures are those after "
    "the last step"
)
Strength = float | None
"""Lambda, or None for the teacher as trained by log-likelihood."""


def teacher(data: ImageData, strength: Strength) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher and its row: information on training and test data at each temperature."""
    key = {
        "data": data.name,
        "samples": len(data.train),
        "seed": data.seed,
        "lambda": strength,
        "training": key_of(TRAINING),
        "tuning": None if strength is None else key_of(TUNING),
        "widths": WIDTHS,
    }
    finished = FinishedRuns("distill_image_teachers")
    folder = finished.path.parent / "distill-teachers"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.safetensors"
    torch.manual_seed(data.seed)
    model = ResNet(8, WIDTHS, 10, 1)
    if path.exists():
        model.load_state_dict(load_file(path))
        model.eval()
        return model, finished.of(key, lambda: _row(model, data, strength, None, None))
    begin = time.process_time()
    stopped = None
    if strength is None:
        train_student(
            model, None, loader(data.train, train=True), "ce", replace(TRAINING, seed=data.seed)
        )  # the framework ce is plain training by labels
    else:
        model = copy.deepcopy(teacher(data, None)[0])
        settings = replace(TUNING, strength=strength, seed=data.seed)
        stopped = fine_tune(model, loader(data.train, train=True), settings).stopped
    model.eval()
    seconds = round(time.process_time() - begin, 1)
    row = finished.of(key, lambda: _row(model, data, strength, stopped, seconds))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model, row


def key_of(settings: StudentSettings | TeacherSettings) -> list[Any]:
    """What of the settings is not the library's default."""
    return [settings.epochs, asdict(settings.optimiser)]


def _row(
    model: nn.Module, data: ImageData, strength: Strength, stopped: str | None, seconds: float | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": data.seed, "lambda": strength, "stopped": stopped, "cpu_seconds": seconds}
    for split in ("train", "validation", "test"):
        passes = measure_information(model, loader(getattr(data, split), 256), temperatures=TEMPERATURES)
        summaries = [information.summary() for information in passes]
        first = summaries[0]
        found[split] = {
            "cmi": first.cmi,
            "ncmi": first.ncmi,
            "log_likelihood": first.log_likelihood,
            "accuracy": first.accuracy,
            "ece": first.ece,
            "cmi_by_temperature": {f"{s.temperature:g}": s.cmi for s in summaries},
        }
    train, test = found["train"], found["test"]
    print(
        f"{data.name} seed {data.seed} lambda {strength}: CMI {train['cmi']:.4f} / {test['cmi']:.4f}, "
        f"accuracy {train['accuracy']:.4f} / {test['accuracy']:.4f}, {seconds} s",
        flush=True,
    )
    return found
