# SPDX-License-Identifier: Apache-2.0
"""An `EncoderClassifier` in a folder: a checkpoint of transformers, and its head beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from calib.distill.classifier import Classifier
from calib.distill.encoder import EncoderClassifier
from calib.distill.readable import readable
from calib.distill.task import ClassificationTask
from calib.models.quiet import quiet_transformers
from calib.schema.distill import EncoderFile

__all__ = ["load_encoder", "save_encoder"]

_FILE = "classifier.json"
_HEAD = "head.safetensors"


def save_encoder(folder: Path, classifier: Classifier) -> None:
    """Writes the encoder as transformers does, with its tokenizer, and the head; `folder` exists.

    transformers and `calib measure` open the folder as the encoder that it is, `load_encoder` as the classifier.

    Args:
        folder: where to.
        classifier: whose model is an `EncoderClassifier`.
    """
    model = classifier.model
    assert isinstance(model, EncoderClassifier)
    encoder: Any = model.encoder
    with quiet_transformers():  # it draws a bar
        encoder.save_pretrained(folder)
    if classifier.tokenizer is not None:
        classifier.tokenizer.save_pretrained(folder)
    head = {name: tensor.contiguous().cpu() for name, tensor in model.classifier.state_dict().items()}
    save_file(head, folder / _HEAD)
    record = EncoderFile(
        classes=classifier.classes, class_names=classifier.class_names, max_length=classifier.max_length
    )
    (folder / _FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_encoder(folder: Path, device: str = "auto") -> Classifier:
    """Reads what `save_encoder` wrote, in evaluation mode.

    Raises:
        ArtifactError: the head is missing or damaged, or of another version.
        ModelError: the encoder cannot be opened.
    """
    from calib.models import open_model

    with readable(folder):
        record = EncoderFile.model_validate(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        found = open_model(folder, task="feature-extraction", device=device, dtype="float32")
        model: nn.Module = EncoderClassifier(found.model, record.classes)
        model.classifier.load_state_dict(load_file(folder / _HEAD))  # type: ignore[union-attr]
    return Classifier(
        model=model.to(next(found.model.parameters()).device).eval(),
        kind="text",
        classes=record.classes,
        name=folder.name,
        task=ClassificationTask(),
        label_ids={name: number for number, name in enumerate(record.class_names)},
        tokenizer=found.tokenizer,
        max_length=record.max_length,
    )
