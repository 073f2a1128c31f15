# SPDX-License-Identifier: Apache-2.0
"""A built-in network in a folder: `classifier.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from calib.distill.classifier import Classifier
from calib.distill.networks import make_network, make_text_network
from calib.distill.readable import readable
from calib.distill.task import ClassificationTask
from calib.models.device import choose_device
from calib.models.tokens import load_tokenizer
from calib.schema.distill import ImageInput, NetworkFile

__all__ = ["load_network", "save_network"]

_FILE = "classifier.json"
_WEIGHTS = "model.safetensors"


def save_network(folder: Path, classifier: Classifier, network: str) -> None:
    """Writes a built-in network with its inputs and class names; `folder` exists.

    Args:
        folder: where to.
        classifier: of kind image, or of kind text with a tokenizer.
        network: its name in `NETWORKS` or `TEXT_NETWORKS`.
    """
    text = classifier.kind == "text"
    record = NetworkFile(
        network=network,
        classes=classifier.classes,
        class_names=classifier.class_names,
        image=None if text else classifier.image or ImageInput(),
        vocabulary=len(classifier.tokenizer) if text and classifier.tokenizer is not None else None,
        max_length=classifier.max_length if text else None,
    )
    if text and classifier.tokenizer is not None:
        classifier.tokenizer.save_pretrained(folder)
    (folder / _FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous().cpu() for name, tensor in classifier.model.state_dict().items()}
    save_file(state, folder / _WEIGHTS)


def load_network(folder: Path, device: str = "auto") -> Classifier:
    """Reads what `save_network` wrote, in evaluation mode.

    Raises:
        ArtifactError: a file is missing, damaged, or of another version.
    """
    with readable(folder):
        record = NetworkFile.model_validate(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        model = _network(record)
        model.load_state_dict(load_file(folder / _WEIGHTS))
    return Classifier(
        model=model.to(choose_device(device)).eval(),
        kind="image" if record.image is not None else "text",
        classes=record.classes,
        name=folder.name,
        task=ClassificationTask(),
        label_ids={name: number for number, name in enumerate(record.class_names)},
        image=record.image,
        tokenizer=None if record.image is not None else load_tokenizer(folder, str(folder)),
        max_length=record.max_length or Classifier.max_length,
        network=record.network,
    )


def _network(record: NetworkFile) -> nn.Module:
    image = record.image
    if image is not None:
        return make_network(record.network, record.classes, channels=image.channels, size=image.size or 1)
    length, vocabulary = record.max_length or 0, record.vocabulary or 0
    return make_text_network(record.network, record.classes, vocabulary=vocabulary, length=length)
