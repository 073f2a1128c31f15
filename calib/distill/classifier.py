# SPDX-License-Identifier: Apache-2.0
"""A classifier with what its inputs need: a checkpoint of transformers, or a network of ours saved in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from calib.distill.data import ImageSet, Records, TextSet, collate_texts
from calib.distill.language import BlockSet
from calib.distill.networks import make_network
from calib.distill.task import ClassificationTask, Task
from calib.errors import ArtifactError, UsageError
from calib.schema.distill import ImageInput, NetworkFile

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = [
    "Classifier",
    "classifier_of",
    "is_network",
    "keep_model",
    "load_network",
    "open_classifier",
    "save_network",
]

_FILE = "classifier.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Classifier:
    """A model and how records become its inputs."""

    model: nn.Module
    kind: Literal["image", "text", "language"]
    classes: int
    name: str
    task: Task
    label_ids: dict[str, int] | None = None
    image: ImageInput | None = None
    tokenizer: Any | None = None
    max_length: int = 128

    def dataset(self, records: Records) -> Dataset[Any]:
        """The records as this model reads them, labels in its order."""
        if self.kind == "language":
            return BlockSet(records)
        records = records.renamed(self.label_ids, self.name)
        if len(records.class_names) > self.classes:
            raise UsageError(
                f"{records.source}: {len(records.class_names)} classes, but {self.name} has {self.classes} outputs; "
                "pass the data set it was trained for"
            )
        if self.kind == "text":
            return TextSet(records, self.tokenizer, max_length=self.max_length)
        image = self.image or ImageInput()
        return ImageSet(records, size=image.size, channels=image.channels, mean=image.mean, std=image.std)

    def loader(
        self, dataset: Dataset[Any], *, batch_size: int = 64, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """Batches that `task` understands; shuffled by torch's global generator."""
        collate: Callable[[Any], Any] | None = collate_texts if self.kind == "text" else None
        return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=collate)

    def batches(
        self, records: Records, batch_size: int | None = None, *, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """A loader over records; no batch is larger than they are many.

        Args:
            records: samples.
            batch_size: 256 if absent, of a language model 8: it has a decision at each position, over all tokens.
            shuffle: by torch's global generator.
            drop_last: no batch that is not full.
        """
        size = min(batch_size or (8 if self.kind == "language" else 256), len(records))
        return self.loader(self.dataset(records), batch_size=size, shuffle=shuffle, drop_last=drop_last)

    def of(self, model: nn.Module, name: str | None = None) -> Classifier:
        """Another model with the same inputs."""
        return replace(self, model=model, name=name or self.name)


def is_network(reference: str) -> bool:
    """Whether a folder was written by `save_network`."""
    return (Path(reference) / _FILE).is_file()


def open_classifier(reference: str, **options: Any) -> Classifier:
    """Opens a folder of `save_network`, or whatever `calib.models.open_model` opens as a classifier.

    Args:
        reference: folder or hub id.
        options: what `open_model` takes.

    Raises:
        UsageError: the model is no image or text classifier with 2 or more classes.
        ArtifactError: a folder of ours is damaged.
        ModelError: see `open_model`.
    """
    if is_network(reference):
        return load_network(Path(reference), device=str(options.get("device", "auto")))
    from calib.models import open_model

    return classifier_of(open_model(reference, **options), reference)


def classifier_of(found: OpenedModel, reference: str) -> Classifier:
    """A model that is open already.

    Args:
        found: of any task.
        reference: how errors call it.

    Raises:
        UsageError: it is no image or text classifier with 2 or more classes.
    """
    config: Any = found.model.config
    if found.task not in ("text-classification", "image-classification"):
        raise UsageError(
            f"{reference}: its task is {found.task}; pass a text or image classifier, or --task if that is what it is"
        )
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise UsageError(
            f"{reference}: {config.num_labels} outputs, {config.problem_type or 'regression'}; "
            "CMI is about one of several classes"
        )
    text = found.task == "text-classification"
    return Classifier(
        model=found.model,
        kind="text" if text else "image",
        classes=int(config.num_labels),
        name=reference,
        task=ClassificationTask(),
        label_ids=dict(config.label2id),
        image=None if text else _image_input(found.folder, reference),
        tokenizer=found.tokenizer,
    )


def keep_model(folder: Path, classifier: Classifier, network: str | None) -> None:
    """Writes a network of ours or a language model into a new folder; of what has neither form it writes nothing."""
    if network is not None:
        folder.mkdir(exist_ok=True)
        save_network(folder, classifier, network)
    elif classifier.kind == "language":
        model: Any = classifier.model
        model.save_pretrained(folder)
        if classifier.tokenizer is not None:
            classifier.tokenizer.save_pretrained(folder)


def save_network(folder: Path, classifier: Classifier, network: str) -> None:
    """Writes a network of `NETWORKS` with its inputs and class names; `folder` exists.

    Args:
        folder: where to.
        classifier: of kind image.
        network: its name in `NETWORKS`.
    """
    names = classifier.label_ids or {str(number): number for number in range(classifier.classes)}
    record = NetworkFile(
        network=network,
        classes=classifier.classes,
        class_names=sorted(names, key=lambda name: names[name]),
        image=classifier.image or ImageInput(),
    )
    (folder / _FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous().cpu() for name, tensor in classifier.model.state_dict().items()}
    save_file(state, folder / _WEIGHTS)


def load_network(folder: Path, device: str = "auto") -> Classifier:
    """Reads what `save_network` wrote, in evaluation mode.

    Raises:
        ArtifactError: a file is missing, damaged, or of another version.
    """
    try:
        record = NetworkFile.model_validate(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        model = make_network(
            record.network, record.classes, channels=record.image.channels, size=record.image.size or 1
        )
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, ValueError, ValidationError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{folder}: no usable classifier ({reason}); write it again with calib distill run"
        ) from error
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return Classifier(
        model=model.to(target).eval(),
        kind="image",
        classes=record.classes,
        name=folder.name,
        task=ClassificationTask(),
        label_ids={name: number for number, name in enumerate(record.class_names)},
        image=record.image,
    )


def _image_input(folder: Path, reference: str) -> ImageInput:
    """Size and normalisation from the checkpoint's own file: the class that reads it may need torchvision."""
    path = folder / "preprocessor_config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        size = record.get("size", 224)
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        plain = not record.get("do_normalize", True)
        return ImageInput(
            size=int(size),
            mean=[0.0] if plain else record["image_mean"],
            std=[1.0] if plain else record["image_std"],
        )
    except (OSError, ValueError, TypeError, KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{reference}: how its images are normalised is unknown, preprocessor_config.json is no help ({reason}); "
            "add that file to the checkpoint"
        ) from error
