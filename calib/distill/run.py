# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe: teachers with their control, students by every framework and condition, paired gains over seeds."""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from calib import __version__
from calib.distill.centroids import ClassBalancedBatches
from calib.distill.checkpoint import Checkpoint
from calib.distill.classifier import Classifier, collation
from calib.distill.cmi import measure_information
from calib.distill.data import Records, spread_over_classes
from calib.distill.distillation import EpochRecord
from calib.distill.folders import keep_model
from calib.distill.gains import paired_gains
from calib.distill.grouping import RowGrouping, frequent_rows
from calib.distill.language import next_token_counts
from calib.distill.prepare import RecipeData, make_classifier, optimiser_settings, read_data
from calib.distill.protocols import (
    Condition,
    compare_cams,
    few_shot_conditions,
    shifted_and_flipped,
    temperature_study,
    without_classes,
)
from calib.distill.protocols.eigencam import save_cams
from calib.distill.ranks import Ranks
from calib.distill.rehearsal import rehearse
from calib.distill.student import train_student
from calib.distill.student_rows import StudentTrainer, student_settings
from calib.distill.sweep import sweep_strength
from calib.distill.teacher import TeacherRun, TeacherSettings, fine_tune_with_control
from calib.distill.training_log import EVENTS, TrainingLog
from calib.distill.training_log import FILE as LOG
from calib.errors import UsageError
from calib.schema.distill import DistillRecipe, DistillReport, FrameworkRecipe, StudentRow, TeacherRow
from calib.schema.provenance import Producer

__all__ = ["run_recipe"]

Progress = Callable[[str], None]
TeacherName = Literal["mll", "control", "mcmi"]
_CAM_IMAGES = 256


def run_recipe(
    recipe: DistillRecipe,
    folder: Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    work: Path | None = None,
) -> DistillReport:
    """Runs a recipe and writes `report.json`, `log.csv`, and of the first seed teachers and Eigen-CAM maps.

    Test data are read once per finished model, never to choose anything; lambda is chosen on validation data.
    Under `accelerate launch` each process trains on its part of every batch, and the first one writes.

    Args:
        recipe: what to do.
        folder: an empty folder.
        device: auto, cpu or cuda.
        progress: called with a line now and then.
        work: folder for checkpoints and finished rows. What it holds of this recipe is not done again, and a training
            that was broken off in it goes on, to the result of an unbroken run.

    Raises:
        UsageError: models and data do not fit together.
        CorpusError: the data cannot be read.
        ArtifactError: a checkpoint is damaged, or of another training.
    """
    ranks = Ranks(cpu=device == "cpu" or not torch.cuda.is_available())
    silent: Progress = lambda line: None  # noqa: E731
    run = _Run(recipe, folder, device, (progress if ranks.main else None) or silent, read_data(recipe), ranks, work)
    run.conditions(recipe.seeds[0])  # refuses what it must before anything is trained
    rehearse(recipe, run.data, device)
    for seed in recipe.seeds:
        run.seed(seed)
    report = DistillReport(
        producer=Producer(version=__version__),
        recipe=recipe,
        versions={"python": platform.python_version(), "torch": str(torch.__version__)},
        data={
            "source": recipe.data.source,
            "classes": run.data.classes,
            "train": len(run.data.train),
            "validation": len(run.data.validation),
            "test": len(run.data.test),
        },
        class_names=list(run.data.train.class_names),
        teachers=run.teachers,
        students=run.students,
        gains=paired_gains(run.students),
        covered_area=run.covered_area,
        warnings=run.warnings,
    )
    if ranks.main:
        run.collect()
        (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return report


@dataclass
class _Run:
    recipe: DistillRecipe
    folder: Path
    device: str
    progress: Progress
    data: RecipeData
    ranks: Ranks
    work: Path | None
    teachers: list[TeacherRow] = field(default_factory=list)
    students: list[StudentRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    covered_area: dict[str, float] | None = None
    grouping: RowGrouping | None = None

    def __post_init__(self) -> None:
        self.kept = self.work or self.folder
        self.log: Callable[[str, EpochRecord], None] = lambda name, record: None
        if self.ranks.main:
            self.log = TrainingLog(self.kept, tensorboard=self.recipe.tensorboard)

    def collect(self) -> None:
        """Brings what was kept beside the checkpoints into the folder."""
        if isinstance(self.log, TrainingLog):
            self.log.close()
        if self.work is None:
            return
        for path in self.work.iterdir():
            if path.name == LOG:
                shutil.copy2(path, self.folder)
            elif path.is_dir() and (path.name.startswith("student-") or path.name == EVENTS):
                shutil.copytree(path, self.folder / path.name)

    def seed(self, seed: int) -> None:
        found = self._teachers(seed)
        if seed == self.recipe.seeds[0] and self.ranks.main:
            self._keep(found)
        trainer = StudentTrainer(
            self.recipe, self.data, seed, self.device, self.kept, self.work, self.ranks, self.log, self.progress
        )
        for condition in self.conditions(seed):
            self.students += trainer.students(FrameworkRecipe(name="ce"), "none", None, condition)
            for framework in self.recipe.student.frameworks:
                for name, teacher in found.items():
                    if framework.name != "ce":
                        self.students += trainer.students(framework, name, teacher, condition)

    def _teachers(self, seed: int) -> dict[TeacherName, Classifier]:
        recipe = self.recipe
        mll = make_classifier(recipe.teacher, recipe, self.data, seed, self.device)
        if mll.kind == "language" and self.grouping is None:
            # rows for each temperature are in memory together
            memory = recipe.mcmi.row_memory * 1_000_000 // max(1, len(recipe.temperatures))
            counts = next_token_counts(self.data.train, mll.classes)
            self.grouping = frequent_rows(counts, memory_bytes=memory)
        if recipe.teacher.trained_here:
            training = recipe.teacher.training
            train_student(
                mll.model,
                None,
                mll.batches(self.data.train, training.batch_size, shuffle=True, drop_last=True),
                "ce",
                student_settings(training, seed),
                task=mll.task,
                transform=shifted_and_flipped if training.augment else None,
                progress=self.progress,
                checkpoint=None if self.work is None else Checkpoint(self.work / f"teacher-{seed}.safetensors"),
                ranks=self.ranks,
                name=f"seed {seed}, teacher",
                log=self.log,
            )
        mcmi = mll.of(copy.deepcopy(mll.model))
        found: dict[TeacherName, Classifier] = {"mll": mll}
        runs, chosen, control = self._fine_tuned(mcmi, seed)
        if control is not None:
            found["control"] = mll.of(control)
        found["mcmi"] = mll.of(chosen)
        for name, classifier in found.items():
            self._teacher_row(seed, name, classifier, runs.get(name))
        return found

    def _fine_tuned(self, start: Classifier, seed: int) -> tuple[dict[str, TeacherRun], Any, Any]:
        plan = self.recipe.mcmi
        settings = TeacherSettings(
            strength=plan.strengths[0],
            epochs=plan.epochs,
            optimiser=optimiser_settings(plan.optimiser),
            clip_norm=plan.clip_norm,
            refresh=plan.refresh,
            ema_momentum=plan.ema_momentum,
            seed=seed,
        )
        train = start.batches(self.data.train, plan.batch_size, shuffle=True)
        options: dict[str, Any] = {
            "task": start.task,
            "progress": self.progress,
            "checkpoints": None if self.work is None else self.work / f"fine-tuned-{seed}",
            "ranks": self.ranks,
            "grouping": self.grouping,
            "name": f"seed {seed}, teacher",
            "log": self.log,
        }
        if plan.refresh == "ema":
            sampler = ClassBalancedBatches(
                self.data.train.labels, seed=seed, classes_per_batch=plan.batch_size // 8 or 1
            )
            samples = start.dataset(self.data.train)
            options["balanced"] = DataLoader(samples, batch_sampler=sampler, collate_fn=collation(samples))
        validation = start.batches(self.data.validation, plan.batch_size)
        if len(plan.strengths) > 1:
            swept = sweep_strength(start.model, train, validation, plan.strengths, settings, **options)
            best = next(point.run for point in swept.points if point.strength == swept.strength)
            if swept.strength == 0:
                self.warnings.append(
                    f"seed {seed}: no lambda beat the control on validation data; the control stands in"
                )
            return {"control": swept.control.run, "mcmi": best}, swept.model, swept.control_model
        result = fine_tune_with_control(
            start.model, train, settings, control=plan.control, validation=validation, **options
        )
        self.warnings += [f"seed {seed}: {warning}" for warning in result.warnings]
        runs = {"mcmi": result.mcmi} | ({} if result.control is None else {"control": result.control})
        return runs, start.model, result.control_model

    def _teacher_row(self, seed: int, name: TeacherName, classifier: Classifier, run: TeacherRun | None) -> None:
        def summary(records: Records) -> dict[str, Any]:
            loader = classifier.batches(records)
            found = measure_information(classifier.model, loader, task=classifier.task, **shared)
            return found[0].summary().to_dict()

        rows = self.grouping
        shared: dict[str, Any] = {} if rows is None else {"rows": (rows.rows, rows.row_of_label), "separation": False}
        loader = classifier.batches(self.data.train)
        points = temperature_study(
            {name: classifier.model}, loader, self.recipe.temperatures, classifier.task, **shared
        )
        row = TeacherRow(
            seed=seed,
            teacher=name,
            strength=None if run is None else run.strength,
            train=summary(self.data.train),
            validation=summary(self.data.validation),
            test=summary(self.data.test),
            temperatures=[{"temperature": p.temperature, "cmi": p.cmi, "ncmi": p.ncmi} for p in points],
            stopped=None if run is None else run.stopped,
        )
        self.teachers.append(row)

    def conditions(self, seed: int) -> list[Condition]:
        """What students get to see."""
        plan, train = self.recipe.protocol, self.data.train
        if plan.kind == "few-shot":
            return few_shot_conditions(train, plan.shares, seed)
        if plan.kind == "full":
            return [Condition("full", train)]
        found = []
        for classes in plan.omitted:
            kept, numbers = without_classes(train, classes)
            name = "without " + ", ".join(train.class_names[number] for number in numbers)
            found.append(Condition(name, kept, numbers))
        return found

    def _keep(self, found: dict[TeacherName, Classifier]) -> None:
        for name, classifier in found.items():
            keep_model(self.folder / f"teacher-{name}", classifier)
        first = next(iter(found.values()))
        if first.kind != "image":
            return
        test = self.data.test
        batch = next(iter(first.batches(test.select(spread_over_classes(test.labels, _CAM_IMAGES)), _CAM_IMAGES)))
        try:
            maps = compare_cams({name: one.model for name, one in found.items()}, batch, first.task)
            save_cams(self.folder / "eigen_cam.png", batch[0], maps)
        except UsageError as error:
            self.progress(f"no Eigen-CAM maps: {error}")
            return
        self.covered_area = maps.area
