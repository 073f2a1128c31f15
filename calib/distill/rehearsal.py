# SPDX-License-Identifier: Apache-2.0
"""What a recipe asks for, tried out on one batch: hours of training are no place to learn that it cannot be."""

from __future__ import annotations

from typing import Any

import torch

from calib.distill.classifier import Classifier
from calib.distill.prepare import RecipeData, make_classifier
from calib.distill.student import fitted_sides
from calib.errors import UsageError
from calib.schema.distill import DistillRecipe

__all__ = ["check_inputs", "rehearse"]

_SAMPLES = 4


def rehearse(recipe: DistillRecipe, data: RecipeData, device: str) -> None:
    """Opens teacher and student and fits every framework to them; leaves nothing behind.

    Args:
        recipe: what is to be done.
        data: its data.
        device: auto, cpu or cuda.

    Raises:
        UsageError: models, data and frameworks do not fit together.
        ModelError: a model cannot be opened, or cannot read the data.
    """
    seed = recipe.seeds[0]
    teacher = make_classifier(recipe.teacher, recipe, data, seed, device)
    student = make_classifier(recipe.student, recipe, data, seed, device)
    check_inputs(student, teacher)
    with torch.random.fork_rng():
        batch = next(iter(student.batches(data.train, _SAMPLES)))
        for framework in recipe.student.frameworks:
            by = None if framework.name == "ce" else teacher.model
            fitted_sides(student.model, by, batch, framework.name, student.task, len(data.train), framework.weights)


def check_inputs(student: Classifier, teacher: Classifier) -> None:
    """Refuses a pair that cannot read one batch.

    Raises:
        UsageError: other images, other inputs of a sound, or another vocabulary.
    """
    if student.image != teacher.image:
        raise UsageError(
            f"student {student.name} and teacher {teacher.name}: expect other images; "
            "set data.image to what the teacher takes"
        )
    extractors = [None if one.processor is None else one.processor.to_dict() for one in (student, teacher)]
    if extractors[0] != extractors[1]:
        raise UsageError(
            f"student {student.name} and teacher {teacher.name}: make other inputs of a sound; choose a pair that "
            "shares its preprocessor_config.json"
        )
    vocabularies: list[Any] = [
        None if one.tokenizer is None else one.tokenizer.get_vocab() for one in (student, teacher)
    ]
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"student {student.name} and teacher {teacher.name}: have other vocabularies; choose a pair with one"
        )
