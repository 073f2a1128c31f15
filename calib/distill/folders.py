# SPDX-License-Identifier: Apache-2.0
"""Classifiers in folders, whoever wrote them: `open_classifier` opens what `keep_model` keeps, and any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calib.distill.classifier import Classifier, classifier_of
from calib.distill.encoder import EncoderClassifier
from calib.distill.encoder_folder import load_encoder, save_encoder
from calib.distill.network_folder import load_network, save_network
from calib.models.quiet import quiet_transformers
from calib.schema.distill import EncoderFile

__all__ = ["is_kept", "keep_model", "load_kept", "open_classifier"]

_FILE = "classifier.json"


def is_kept(reference: str) -> bool:
    """Whether a folder holds a classifier in a form of ours."""
    return (Path(reference) / _FILE).is_file()


def load_kept(folder: Path, device: str = "auto") -> Classifier:
    """Opens a folder in a form of ours.

    Raises:
        ArtifactError: it is damaged, or of another version.
        ModelError: its encoder cannot be opened.
    """
    try:
        form = json.loads((folder / _FILE).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        form = None  # `load_network` says what is wrong
    of_encoder = form == EncoderFile.model_fields["format"].default
    return load_encoder(folder, device) if of_encoder else load_network(folder, device)


def open_classifier(reference: str, **options: Any) -> Classifier:
    """Opens a folder of `keep_model`, or whatever `calib.models.open_model` opens as a classifier.

    Args:
        reference: folder or hub id.
        options: what `open_model` takes.

    Raises:
        UsageError: the model is no classifier of images, texts or sound with 2 or more classes.
        ArtifactError: a folder of ours is damaged.
        ModelError: see `open_model`.
    """
    if is_kept(reference):
        return load_kept(Path(reference), device=str(options.get("device", "auto")))
    from calib.models import open_model

    return classifier_of(open_model(reference, **options), reference)


def keep_model(folder: Path, classifier: Classifier) -> None:
    """Writes a model into a new folder: networks and encoders in forms of ours, all others as transformers does.

    Args:
        folder: where to; made if it is not there.
        classifier: what to write.
    """
    folder.mkdir(exist_ok=True)
    if classifier.network is not None:
        save_network(folder, classifier, classifier.network)
        return
    if isinstance(classifier.model, EncoderClassifier):
        save_encoder(folder, classifier)
        return
    model: Any = classifier.model
    with quiet_transformers():  # it draws a bar
        model.save_pretrained(folder)
    for companion in (classifier.tokenizer, classifier.processor):
        if companion is not None:
            companion.save_pretrained(folder)
    if classifier.image is not None:
        image = classifier.image
        size = {"height": image.size, "width": image.size}
        record = {"do_resize": True, "size": size, "do_normalize": True, "image_mean": image.mean}
        text = json.dumps(record | {"image_std": image.std}, indent=2)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
