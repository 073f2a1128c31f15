# SPDX-License-Identifier: Apache-2.0
"""What a card says of classes that a student never saw, and of temperatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calib.report.distill import temperature_curves
from calib.report.distill_card import write_card
from calib.schema.distill import DistillReport


def report(**changes: Any) -> DistillReport:
    training = {"epochs": 1, "batch_size": 4}
    summary = {"cmi": 0.5, "accuracy": 0.75}
    teacher = {"train": summary, "validation": summary, "test": summary, "strength": None}
    student = {
        "teacher": "none",
        "framework": "ce",
        "condition": "without cat",
        "samples": 8,
        "samples_per_class": 4,
        "steps": 2,
        "accuracy": 0.5,
    }
    given: dict[str, Any] = {
        "producer": {"version": "1"},
        "recipe": {
            "metadata": {"title": "t", "description": "d"},
            "task": "image-classification",
            "data": {"source": "s"},
            "teacher": {"network": "mlp16", "training": training},
            "student": {"network": "mlp16", "training": training, "frameworks": [{"name": "kd"}]},
            "temperatures": [1, 4],
            "seeds": [0, 1],
        },
        "versions": {},
        "data": {"classes": 2, "train": 8, "validation": 2, "test": 10},
        "class_names": ["cat", "dog"],
        "teachers": [
            {
                **teacher,
                "seed": seed,
                "teacher": "mll",
                "temperatures": [{"temperature": t, "cmi": seed + t, "ncmi": 0.1} for t in (1.0, 4.0)],
            }
            for seed in (0, 1)
        ],
        "students": [
            {
                **student,
                "seed": seed,
                "omitted_recall": 0.2 * seed,
                "kept_accuracy": 1.0,
                "confusion": [[seed, 5 - seed], [0, 5]],
            }
            for seed in (0, 1)
        ],
        "gains": [],
        "warnings": [],
    }
    return DistillReport.model_validate(given | changes)


def test_recall_and_confusion_of_omitted_classes_and_cmi_by_temperature_are_on_the_card(tmp_path: Path) -> None:
    found = report()
    assert temperature_curves(found) == {"mll": [(1.0, 1.5), (4.0, 4.5)]}
    card = write_card(found, tmp_path).read_text()
    assert "| recall of omitted classes | accuracy on the others |" in card
    assert "| without cat | 8 | ce | 50.00% | 10.00% | 100.00% |" in card
    assert "| | cat | dog |\n|---|---|---|\n| cat | 1 | 9 |\n| dog | 0 | 10 |" in card  # sums over the seeds
    assert "| CMI, training | T 1 | T 4 |" in card
    assert "| mll | 1.5000 | 4.5000 |" in card
