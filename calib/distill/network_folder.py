# SPDX-License-Identifier: Apache-2.0
"""A built-in network in a folder: `classifier.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calib.distill.classifier import Classifier
from calib.distill.networks import make_network
from calib.distill.task import ClassificationTask
from calib.errors import ArtifactError
from calib.models.device import choose_device
from calib.schema.distill import ImageInput, NetworkFile

__all__ = ["load_network", "save_network"]

_FILE = "classifier.json"
_WEIGHTS = "model.safetensors"


def save_network(folder: Path, classifier: Classifier, network: str) -> None:
    """Writes a network of `NETWORKS` with its inputs and class names; `folder` exists.

    Args:
        folder: where to.
        classifier: of kind image.
        network: its name in `NETWORKS`.
    """
    record = NetworkFile(
        network=network,
        classes=classifier.classes,
        class_names=classifier.class_names,
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
    return Classifier(
        model=model.to(choose_device(device)).eval(),
        kind="image",
        classes=record.classes,
        name=folder.name,
        task=ClassificationTask(),
        label_ids={name: number for number, name in enumerate(record.class_names)},
        image=record.image,
        network=record.network,
    )
