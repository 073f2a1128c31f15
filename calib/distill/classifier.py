# SPDX-License-Identifier: Apache-2.0
"""A classifier with what its inputs need, whatever they are: images, texts, sound or token blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from calib.distill.data import ImageSet, Records, SoundSet, TextSet, collate_texts
from calib.distill.language import BlockSet
from calib.distill.task import ClassificationTask, Task
from calib.errors import UsageError
from calib.schema.distill import ImageInput

if TYPE_CHECKING:
    from calib.distill.fresh import FreshModel
    from calib.models import OpenedModel

__all__ = ["Classifier", "Kind", "classifier_of", "collation"]

Kind = Literal["image", "text", "audio", "language"]
_KINDS: dict[str, Kind] = {
    "image-classification": "image",
    "text-classification": "text",
    "audio-classification": "audio",
}
"""Task of transformers -> kind."""


@dataclass(frozen=True)
class Classifier:
    """A model and how records become its inputs; `network` is its name in `NETWORKS`, if it is one of these."""

    model: nn.Module
    kind: Kind
    classes: int
    name: str
    task: Task
    label_ids: dict[str, int] | None = None
    image: ImageInput | None = None
    tokenizer: Any | None = None
    processor: Any | None = None
    max_length: int = 128
    network: str | None = None

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
        if self.kind == "audio":
            return SoundSet(records, self.processor)
        image = self.image or ImageInput()
        return ImageSet(records, size=image.size, channels=image.channels, mean=image.mean, std=image.std)

    def loader(
        self, dataset: Dataset[Any], *, batch_size: int = 64, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """Batches that `task` understands; shuffled by torch's global generator."""
        return DataLoader(
            dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=collation(dataset)
        )

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

    @property
    def class_names(self) -> list[str]:
        """In the order of the outputs."""
        names = self.label_ids or {str(number): number for number in range(self.classes)}
        return sorted(names, key=lambda name: names[name])

    def of(self, model: nn.Module, name: str | None = None) -> Classifier:
        """Another model with the same inputs."""
        return replace(self, model=model, name=name or self.name)


def classifier_of(found: OpenedModel | FreshModel, reference: str) -> Classifier:
    """A model that is open already.

    Args:
        found: of any task.
        reference: how errors call it.

    Raises:
        UsageError: it is no classifier of images, texts or sound with 2 or more classes.
    """
    config: Any = found.model.config
    if found.task not in _KINDS:
        raise UsageError(
            f"{reference}: its task is {found.task}; pass a classifier of texts, images or sound, "
            "or --task if that is what it is"
        )
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise UsageError(
            f"{reference}: {config.num_labels} outputs, {config.problem_type or 'regression'}; "
            "CMI is about one of several classes"
        )
    kind = _KINDS[found.task]
    return Classifier(
        model=found.model,
        kind=kind,
        classes=int(config.num_labels),
        name=reference,
        task=ClassificationTask(),
        label_ids=dict(config.label2id),
        image=_image_input(found.folder, reference) if kind == "image" else None,
        tokenizer=found.tokenizer,
        processor=found.processor if kind == "audio" else None,
    )


def collation(dataset: Dataset[Any]) -> Callable[[Any], Any] | None:
    """What makes a batch of samples of a data set; None for stacking them."""
    if isinstance(dataset, SoundSet):
        return dataset.collate
    return collate_texts if isinstance(dataset, TextSet) else None


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
