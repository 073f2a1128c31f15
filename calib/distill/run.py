# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe: teachers with their control, students by every framework and condition, paired gains over seeds."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from calib import __version__
from calib.distill.centroids import ClassBalancedBatches
from calib.distill.classifier import Classifier, save_network
from calib.distill.cmi import measure_information
from calib.distill.data import Records, collate_texts
from calib.distill.gains import paired_gains
from calib.distill.prepare import RecipeData, make_classifier, optimiser_settings, read_data
from calib.distill.protocols import (
    Condition,
    compare_cams,
    few_shot_conditions,
    shifted_and_flipped,
    temperature_study,
    without_classes,
    zero_shot_result,
)
from calib.distill.protocols.eigencam import save_cams
from calib.distill.student import StudentSettings, train_student
from calib.distill.sweep import sweep_strength
from calib.distill.teacher import TeacherRun, TeacherSettings, fine_tune_with_control
from calib.errors import UsageError
from calib.schema.distill import (
    DistillRecipe,
    DistillReport,
    FrameworkRecipe,
    StudentRow,
    TeacherRow,
    TrainingRecipe,
)
from calib.schema.provenance import Producer

__all__ = ["run_recipe"]

Progress = Callable[[str], None]
TeacherName = Literal["mll", "control", "mcmi"]
_CAM_IMAGES = 8


def run_recipe(
    recipe: DistillRecipe, folder: Path, *, device: str = "auto", progress: Progress | None = None
) -> DistillReport:
    """Runs a recipe and writes `report.json`, the first seed's teachers, and their Eigen-CAM maps into `folder`.

    Test data are read once per finished model, never to choose anything; lambda is chosen on validation data.

    Args:
        recipe: what to do.
        folder: an empty folder.
        device: auto, cpu or cuda.
        progress: called with a line now and then.

    Raises:
        UsageError: models and data do not fit together.
        CorpusError: the data cannot be read.
    """
    run = _Run(recipe, folder, device, progress or (lambda line: None), read_data(recipe))
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
        teachers=run.teachers,
        students=run.students,
        gains=paired_gains(run.students),
        covered_area=run.covered_area,
        warnings=run.warnings,
    )
    (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return report


@dataclass
class _Run:
    recipe: DistillRecipe
    folder: Path
    device: str
    progress: Progress
    data: RecipeData
    teachers: list[TeacherRow] = field(default_factory=list)
    students: list[StudentRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    covered_area: dict[str, float] | None = None

    def seed(self, seed: int) -> None:
        found = self._teachers(seed)
        if seed == self.recipe.seeds[0]:
            self._keep(found)
        batch, full = self.recipe.student.training.batch_size, self.data.train
        steps = max(1, len(full) // batch)
        for condition, omitted in self._conditions(seed):
            row: dict[str, Any] = {"seed": seed, "condition": condition, "omitted": omitted, "steps": steps}
            self._student(FrameworkRecipe(name="ce"), "none", None, **row)
            for framework in self.recipe.student.frameworks:
                for name, teacher in found.items():
                    if framework.name != "ce":
                        self._student(framework, name, teacher, **row)

    def _teachers(self, seed: int) -> dict[TeacherName, Classifier]:
        recipe = self.recipe
        mll = make_classifier(recipe.teacher, recipe, self.data, seed, self.device)
        if recipe.teacher.model is None:
            training = recipe.teacher.training
            loader = self._loader(mll, self.data.train, training.batch_size, shuffle=True, drop_last=True)
            train_student(
                mll.model,
                None,
                loader,
                "ce",
                self._settings(training, seed),
                task=mll.task,
                transform=shifted_and_flipped if training.augment else None,
                progress=self.progress,
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
        train = self._loader(start, self.data.train, plan.batch_size, shuffle=True)
        options: dict[str, Any] = {"task": start.task, "progress": self.progress}
        if plan.refresh == "ema":
            sampler = ClassBalancedBatches(
                self.data.train.labels, seed=seed, classes_per_batch=plan.batch_size // 8 or 1
            )
            collate = collate_texts if start.kind == "text" else None
            options["balanced"] = DataLoader(start.dataset(self.data.train), batch_sampler=sampler, collate_fn=collate)
        validation = self._loader(start, self.data.validation, plan.batch_size)
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
            loader = self._loader(classifier, records)
            return measure_information(classifier.model, loader, task=classifier.task)[0].summary().to_dict()

        loader = self._loader(classifier, self.data.train)
        points = temperature_study({name: classifier.model}, loader, self.recipe.temperatures, classifier.task)
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

    def _conditions(self, seed: int) -> list[tuple[Condition, tuple[int, ...]]]:
        plan, train = self.recipe.protocol, self.data.train
        if plan.kind == "few-shot":
            return [(condition, ()) for condition in few_shot_conditions(train, plan.shares, seed)]
        if plan.kind == "zero-shot":
            found = []
            for classes in plan.omitted:
                kept, numbers = without_classes(train, classes)
                name = "without " + ", ".join(train.class_names[number] for number in numbers)
                found.append((Condition(name, kept, _per_class(kept)), numbers))
            return found
        return [(Condition("full", train, _per_class(train)), ())]

    def _student(
        self,
        framework: FrameworkRecipe,
        teacher_name: Literal["none", "mll", "control", "mcmi"],
        teacher: Classifier | None,
        *,
        seed: int,
        condition: Condition,
        omitted: tuple[int, ...],
        steps: int,
    ) -> None:
        recipe = self.recipe
        training = recipe.student.training
        student = make_classifier(recipe.student, recipe, self.data, seed, self.device)
        if teacher is not None:
            _check_inputs(student, teacher)
        batch = min(training.batch_size, len(condition.records))
        self.progress(f"seed {seed}, {condition.name}: student by {framework.name} of {teacher_name}")
        run = train_student(
            student.model,
            None if teacher is None else teacher.model,
            self._loader(student, condition.records, batch, shuffle=True, drop_last=True),
            framework.name,
            self._settings(training, seed, steps),
            task=student.task,
            weights=framework.model_dump(include={"cross_entropy", "soft_targets", "feature", "temperature"}),
            transform=shifted_and_flipped if training.augment else None,
            progress=self.progress,
        )
        test = self._loader(student, self.data.test)
        found = zero_shot_result(student.model, test, omitted, student.task)
        self.students.append(
            StudentRow(
                seed=seed,
                teacher=teacher_name,
                framework=framework.name,
                condition=condition.name,
                samples=len(condition.records),
                samples_per_class=condition.per_class,
                steps=run.steps,
                accuracy=float(found.confusion.diagonal().sum() / found.confusion.sum()),
                omitted_recall=found.omitted_recall if omitted else None,
                kept_accuracy=found.kept_accuracy if omitted else None,
                confusion=found.confusion.tolist() if omitted else None,
            )
        )

    def _keep(self, found: dict[TeacherName, Classifier]) -> None:
        network = self.recipe.teacher.network
        for name, classifier in found.items():
            if network is not None:
                (self.folder / f"teacher-{name}").mkdir()
                save_network(self.folder / f"teacher-{name}", classifier, network)
        first = next(iter(found.values()))
        if first.kind != "image":
            return
        batch = next(iter(self._loader(first, self.data.test, _CAM_IMAGES)))
        try:
            maps = compare_cams({name: one.model for name, one in found.items()}, batch, first.task)
            save_cams(self.folder / "eigen_cam.png", batch[0], maps)
        except UsageError as error:
            self.progress(f"no Eigen-CAM maps: {error}")
            return
        self.covered_area = maps.area

    def _settings(self, training: TrainingRecipe, seed: int, steps: int | None = None) -> StudentSettings:
        optimiser = optimiser_settings(training.optimiser)
        return StudentSettings(epochs=training.epochs, steps_per_epoch=steps, optimiser=optimiser, seed=seed)

    def _loader(
        self,
        classifier: Classifier,
        records: Records,
        batch: int = 256,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        dataset = classifier.dataset(records)
        return classifier.loader(dataset, batch_size=min(batch, len(records)), shuffle=shuffle, drop_last=drop_last)


def _per_class(records: Records) -> int:
    return min(records.labels.count(label) for label in set(records.labels))


def _check_inputs(student: Classifier, teacher: Classifier) -> None:
    if student.image != teacher.image:
        raise UsageError(
            f"student {student.name} and teacher {teacher.name}: expect other images; "
            "set data.image to what the teacher takes"
        )
    if student.kind == "text" and student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():  # type: ignore[union-attr]
        raise UsageError(
            f"student {student.name} and teacher {teacher.name}: have other vocabularies; choose a pair with one"
        )
