# SPDX-License-Identifier: Apache-2.0
"""From a recipe to data, classifiers and settings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from calib.distill.classifier import Classifier, classifier_of
from calib.distill.data import Records, read_records, split_off, stratified_share
from calib.distill.encoder import EncoderClassifier, shortened
from calib.distill.folders import open_classifier
from calib.distill.fresh import fresh_model
from calib.distill.language import block_records
from calib.distill.networks import NETWORKS, TEXT_NETWORKS, make_network, make_text_network
from calib.distill.optimiser import OptimiserSettings
from calib.distill.task import CausalLanguageTask, ClassificationTask
from calib.errors import UsageError
from calib.models.device import choose_device
from calib.models.source import locate
from calib.models.tokens import load_tokenizer
from calib.schema.distill import DistillRecipe, ModelRecipe, OptimiserRecipe

__all__ = ["RecipeData", "make_classifier", "optimiser_settings", "read_data"]

_BLOCKS = 128
"""Of text, if a recipe does not say how many."""


@dataclass(frozen=True)
class RecipeData:
    """Training, validation and test records without a sample in common, by the seed of the recipe's first run."""

    train: Records
    validation: Records
    test: Records

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.class_names)


def read_data(recipe: DistillRecipe) -> RecipeData:
    """Reads and splits the data of a recipe.

    Raises:
        CorpusError: see `read_records`.
        UsageError: training and test data name other classes.
    """
    data = recipe.data
    if recipe.task == "text-generation":
        return _read_blocks(recipe)
    train, test = read_records(data.source, data.train_split), read_records(data.source, data.test_split)
    if train.class_names != test.class_names:
        if not set(test.class_names) <= set(train.class_names):
            raise UsageError(f"{data.source}: the test data have classes that the training data lack; check the splits")
        test = test.renamed({name: number for number, name in enumerate(train.class_names)})
    _check_classes(train, data.source)
    if data.limit is not None and data.limit < len(train):
        train = train.select(stratified_share(train.labels, data.limit / len(train)))
    parts = split_off(train, data.validation_share)
    return RecipeData(parts.train, parts.validation, test)


def _read_blocks(recipe: DistillRecipe) -> RecipeData:
    """Text as token blocks of the teacher's tokenizer."""
    from calib.corpus import build_blocks

    data, model = recipe.data, str(recipe.teacher.model)
    tokenizer = load_tokenizer(locate(model).folder, model)
    blocks = build_blocks([data.source], tokenizer, samples=data.limit or _BLOCKS, max_length=data.max_length)
    parts = split_off(block_records(blocks, data.source), data.validation_share)
    held_out = len(parts.validation)
    if len(parts.train) <= held_out:
        raise UsageError(f"{data.source}: {len(blocks)} blocks, too few to train, validate and test; raise data.limit")
    rest = split_off(parts.train, held_out / len(parts.train), seed=1)
    return RecipeData(rest.train, parts.validation, rest.validation)


def _check_classes(train: Records, source: str) -> None:
    """Every class needs a sample to train on and one to validate by."""
    if len(train.class_names) < 2:
        raise UsageError(f"{source}: one class only, {train.class_names[0]}; a classifier needs two or more")
    counts = Counter(train.labels)
    for number, name in enumerate(train.class_names):
        if counts[number] < 2:
            raise UsageError(
                f"{source}: {counts[number]} training samples of class {name}; each class needs two or more, "
                "for training and validation"
            )


def make_classifier(source: ModelRecipe, recipe: DistillRecipe, data: RecipeData, seed: int, device: str) -> Classifier:
    """A classifier with the classes of the data: fresh weights by seed, or a checkpoint.

    Raises:
        UsageError: kind of model and task do not fit, or a checkpoint has other classes.
    """
    if source.network is not None and recipe.task not in ("image-classification", "text-classification"):
        raise UsageError(f"network {source.network}: is for images or texts; name a model for {recipe.task}")
    if source.network in NETWORKS and recipe.task == "text-classification":
        raise UsageError(f"network {source.network}: is for images; choose {', '.join(TEXT_NETWORKS)}")
    if source.encoder is not None and recipe.task != "text-classification":
        raise UsageError(f"encoder {source.encoder}: is for texts; name a network or a model for {recipe.task}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if recipe.task == "text-generation":
            return _language_model(source, device)
        if source.network is not None:
            made = _network if recipe.task == "image-classification" else _text_network
            found = made(source, recipe, data, device)
        elif source.encoder is not None:
            found = _encoder(source, data, device)
        else:
            found = _model(source, recipe, data, device)
    names = {name: number for number, name in enumerate(data.train.class_names)}
    return replace(found, label_ids=names, max_length=recipe.data.max_length)


def _model(source: ModelRecipe, recipe: DistillRecipe, data: RecipeData, device: str) -> Classifier:
    """A classifier of transformers, or one that was kept."""
    name = str(source.model)
    if source.fresh is not None:
        fresh = fresh_model(name, source.fresh, recipe.task, data.train.class_names)
        found = classifier_of(fresh, name)
        found = replace(found, model=found.model.to(choose_device(device)))
    else:
        found = open_classifier(name, device=device)
    if found.classes != data.classes:
        raise UsageError(f"{name}: has {found.classes} outputs for {data.classes} classes; pass another model")
    if f"{found.kind}-classification" != recipe.task:
        raise UsageError(f"{name}: is a classifier of kind {found.kind}, the task is {recipe.task}")
    # all models of a run share one order of labels, the data's
    if found.label_ids and data.train.renamed(found.label_ids).labels != data.train.labels:
        raise UsageError(f"{name}: orders its classes otherwise than {recipe.data.source}; rename the labels")
    return found


def _language_model(source: ModelRecipe, device: str) -> Classifier:
    name = str(source.model)
    model, tokenizer = _opened(source, name, "text-generation", device)
    classes = int(model.get_output_embeddings().weight.shape[0])
    return Classifier(model, "language", classes, name, CausalLanguageTask(), tokenizer=tokenizer)


def _network(source: ModelRecipe, recipe: DistillRecipe, data: RecipeData, device: str) -> Classifier:
    image, name = recipe.data.image, str(source.network)
    model = make_network(name, data.classes, channels=image.channels, size=image.size or 1).to(choose_device(device))
    return Classifier(model, "image", data.classes, name, ClassificationTask(), image=image, network=name)


def _text_network(source: ModelRecipe, recipe: DistillRecipe, data: RecipeData, device: str) -> Classifier:
    name, teacher = str(source.network), recipe.teacher.encoder or recipe.teacher.model
    if teacher is None:
        raise UsageError(f"network {name}: reads the tokens of its teacher; give the teacher an encoder or a model")
    tokenizer = load_tokenizer(locate(teacher).folder, teacher)
    if tokenizer is None:
        raise UsageError(f"network {name}: reads the tokens of its teacher, but {teacher} has no tokenizer")
    length = recipe.data.max_length
    model = make_text_network(name, data.classes, vocabulary=len(tokenizer), length=length)
    task = ClassificationTask()
    found = Classifier(model, "text", data.classes, name, task, tokenizer=tokenizer, max_length=length, network=name)
    return replace(found, model=model.to(choose_device(device)))


def _encoder(source: ModelRecipe, data: RecipeData, device: str) -> Classifier:
    name = str(source.encoder)
    encoder, tokenizer = _opened(source, name, "feature-extraction", device)
    model = EncoderClassifier(encoder, data.classes).to(choose_device(device))
    return Classifier(model, "text", data.classes, name, ClassificationTask(), tokenizer=tokenizer)


def _opened(source: ModelRecipe, name: str, task: str, device: str) -> tuple[Any, Any]:
    """Model on its device, as it was saved, shortened or fresh, and its tokenizer."""
    from calib.models import open_model

    if source.fresh is not None:
        fresh = fresh_model(name, source.fresh, task)
        return fresh.model.to(choose_device(device)), fresh.tokenizer
    found = open_model(name, task=task, device=device, dtype="float32")
    return found.model if source.layers is None else shortened(found.model, source.layers), found.tokenizer


def optimiser_settings(recipe: OptimiserRecipe) -> OptimiserSettings:
    """The settings that a recipe names."""
    return OptimiserSettings(**recipe.model_dump())
