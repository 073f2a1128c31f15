# SPDX-License-Identifier: Apache-2.0
"""`StudentTrainer`: the students of one seed, plain and trained for quantization, each once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from calib.distill.checkpoint import Checkpoint
from calib.distill.classifier import Classifier
from calib.distill.cmi import measure_information
from calib.distill.data import stratified_share
from calib.distill.distillation import EpochRecord
from calib.distill.folders import keep_model
from calib.distill.prepare import RecipeData, make_classifier, optimiser_settings
from calib.distill.protocols import Condition, shifted_and_flipped, zero_shot_result
from calib.distill.quantized import FakeQuantization, PeakControl
from calib.distill.ranks import Ranks
from calib.distill.student import StudentRun, StudentSettings, train_student
from calib.errors import ArtifactError
from calib.scales.file import save_scales
from calib.schema.distill import (
    Deployment,
    DistillRecipe,
    FrameworkRecipe,
    Latency,
    QuantizationRecipe,
    StudentRow,
    TrainingRecipe,
)
from calib.schema.scales import ScaleFile

__all__ = ["StudentTrainer", "student_settings"]

TeacherOfRow = Literal["none", "mll", "control", "mcmi"]
Variant = Literal["plain", "friendly"]


@dataclass
class StudentTrainer:
    """Trains students and judges them.

    Attributes:
        recipe: what to do.
        data: its data.
        seed: of weights and order.
        device: auto, cpu or cuda.
        kept: folder for the students of the first seed.
        work: folder for checkpoints and finished rows, if any.
        ranks: processes that share each batch.
        log: gets each epoch.
        progress: gets a line now and then.
    """

    recipe: DistillRecipe
    data: RecipeData
    seed: int
    device: str
    kept: Path
    work: Path | None
    ranks: Ranks
    log: Callable[[str, EpochRecord], None]
    progress: Callable[[str], None]
    latencies: dict[bool, tuple[Latency | None, str | None]] = field(default_factory=dict, init=False)

    def students(
        self,
        framework: FrameworkRecipe,
        teacher_name: TeacherOfRow,
        teacher: Classifier | None,
        condition: Condition,
    ) -> list[StudentRow]:
        """The rows of one framework, teacher and condition.

        Args:
            framework: how to train.
            teacher_name: in rows.
            teacher: None for no teacher.
            condition: what the student gets to see.
        """
        plan = self.recipe.student.quantization
        variants: list[Variant] = ["plain"] if plan is None or plan.plain else []
        variants += ["friendly"] if plan is not None else []
        return [self._row(framework, teacher_name, teacher, condition, variant) for variant in variants]

    def _row(
        self,
        framework: FrameworkRecipe,
        teacher_name: TeacherOfRow,
        teacher: Classifier | None,
        condition: Condition,
        variant: Variant,
    ) -> StudentRow:
        file = "-".join([str(self.seed), condition.name, framework.name, teacher_name, variant])
        file = "".join(c if c.isalnum() or c in "-." else "_" for c in file)
        row_path = None if self.work is None else self.work / f"student-{file}.json"
        if row_path is not None and row_path.exists():
            return _read_row(row_path)
        by = framework.name if teacher is None else f"{framework.name} of {teacher_name}"
        name = f"seed {self.seed}, {condition.name}: student by {by}"
        if self.recipe.student.quantization is not None:
            name += f", {variant}"
        self.progress(name)
        student = make_classifier(self.recipe.student, self.recipe, self.data, self.seed, self.device)
        training = self.recipe.student.training
        checkpoint = None if self.work is None else Checkpoint(self.work / f"student-{file}.safetensors")
        quantization = self.recipe.student.quantization if variant == "friendly" else None
        run = train_student(
            student.model,
            None if teacher is None else teacher.model,
            student.batches(condition.records, training.batch_size, shuffle=True, drop_last=True),
            framework.name,
            student_settings(training, self.seed, len(self.data.train), quantization),
            task=student.task,
            weights=framework.weights,
            transform=shifted_and_flipped if training.augment else None,
            progress=self.progress,
            checkpoint=checkpoint,
            ranks=self.ranks,
            name=name,
            log=self.log,
        )
        if self.seed == self.recipe.seeds[0] and self.ranks.main:
            keep_model(self.kept / f"student-{file}", student)
        row = StudentRow(
            seed=self.seed,
            teacher=teacher_name,
            framework=framework.name,
            variant=variant,
            condition=condition.name,
            samples=len(condition.records),
            samples_per_class=condition.per_class,
            steps=run.steps,
            **self._judged(student, condition.omitted),
            deployment=self._deployment(student, teacher, condition, run, file),
        )
        if row_path is not None and self.ranks.main:
            row_path.write_text(row.model_dump_json() + "\n", encoding="utf-8")
            assert checkpoint is not None
            checkpoint.path.unlink(missing_ok=True)
        self.ranks.wait()
        return row

    def _judged(self, student: Classifier, omitted: tuple[int, ...]) -> dict[str, Any]:
        """Fields of the row, from the test data."""
        test = student.batches(self.data.test)
        if student.kind == "language":  # a table of all pairs of tokens would fill the memory
            shared = (1, torch.zeros(student.classes, dtype=torch.long))
            found = measure_information(student.model, test, task=student.task, separation=False, rows=shared)
            summary = found[0].summary()
            return {"accuracy": summary.accuracy, "log_likelihood": summary.log_likelihood}
        result = zero_shot_result(student.model, test, omitted, student.task)
        accuracy = float(result.confusion.diagonal().sum() / result.confusion.sum())
        if not omitted:
            return {"accuracy": accuracy}
        return {
            "accuracy": accuracy,
            "omitted_recall": result.omitted_recall,
            "kept_accuracy": result.kept_accuracy,
            "confusion": result.confusion.tolist(),
        }

    def _deployment(
        self, student: Classifier, teacher: Classifier | None, condition: Condition, run: StudentRun, file: str
    ) -> Deployment | None:
        plan = self.recipe.student.quantization
        if plan is None:
            return None
        from calib.distill.quantized.deployment import deploy

        records = condition.records
        if plan.calibration < len(records):
            share = plan.calibration / len(records)
            records = records.select(stratified_share(records.labels, share, self.seed))
        calibration, test = student.batches(records), student.batches(self.data.test)
        deployed = deploy(student.model, student.task, calibration, test, name=student.name, learned=run.plan)
        latency, reason = self._latency(student, teacher, deployed.scales, next(iter(calibration)))
        folder = self.kept / f"student-{file}"
        if folder.exists() and self.ranks.main:
            save_scales(deployed.scales, folder)
        return deployed.record.model_copy(update={"latency": latency, "no_latency": reason})

    def _latency(
        self, student: Classifier, teacher: Classifier | None, scales: ScaleFile, batch: Any
    ) -> tuple[Latency | None, str | None]:
        """Measured once with a teacher and once without: the graphs of all students of a run are alike."""
        from calib.distill.quantized.latency import first_input, latency_or_reason

        key = teacher is not None
        if key not in self.latencies:
            model = None if teacher is None else teacher.model
            self.latencies[key] = latency_or_reason(student.model, scales, first_input(batch), model)
        return self.latencies[key]


def student_settings(
    training: TrainingRecipe, seed: int, samples: int | None = None, quantization: QuantizationRecipe | None = None
) -> StudentSettings:
    """Settings from a recipe.

    Args:
        training: epochs, optimiser, precision.
        seed: of the order.
        samples: of the full training data, if an epoch is to be as many steps as these take.
        quantization: for a student trained for it.
    """
    fake = None if quantization is None else quantization.fake
    peaks = None if quantization is None else quantization.peaks
    return StudentSettings(
        epochs=training.epochs,
        steps_per_epoch=None if samples is None else max(1, samples // training.batch_size),
        optimiser=optimiser_settings(training.optimiser),
        precision=training.precision,
        seed=seed,
        quantization=None if fake is None else FakeQuantization(**fake.model_dump()),
        peaks=None if peaks is None else PeakControl(peaks.term, peaks.share, tuple(peaks.sites)),
    )


def _read_row(path: Path) -> StudentRow:
    try:
        return StudentRow.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: damaged row ({' '.join(str(error).split())[:120]}); remove it and resume"
        ) from error
