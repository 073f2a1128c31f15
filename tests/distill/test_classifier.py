# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.distill.classifier import Classifier
from calib.distill.cmi import measure_information
from calib.distill.data import Records
from calib.distill.features import find_features
from calib.distill.folders import keep_model, open_classifier
from calib.distill.network_folder import load_network, save_network
from calib.distill.networks import make_network
from calib.distill.task import ClassificationTask
from calib.errors import ArtifactError, UsageError
from calib.schema.distill import ImageInput


def ours() -> Classifier:
    return Classifier(
        model=make_network("resnet8", 3, channels=1, size=8),
        kind="image",
        classes=3,
        name="ours",
        task=ClassificationTask(),
        label_ids={"c": 0, "a": 1, "b": 2},
        image=ImageInput(size=8, channels=1, mean=[0.1], std=[0.3]),
    )


def images(names: tuple[str, ...] = ("a", "b", "c")) -> Records:
    generator = torch.Generator().manual_seed(0)
    inputs = list(torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8))
    return Records(inputs, tuple(n % len(names) for n in range(12)), names, "images")


def test_a_saved_network_classifies_as_before(tmp_path: Path) -> None:
    classifier = ours()
    save_network(tmp_path, classifier, "resnet8")
    found = open_classifier(str(tmp_path), device="cpu")
    assert (found.label_ids, found.image) == (classifier.label_ids, classifier.image)
    left, right = (
        measure_information(one.model, one.loader(one.dataset(images()), batch_size=5))[0].summary()
        for one in (classifier, found)
    )
    assert left == right
    assert found.dataset(images()).labels.tolist()[:3] == [1, 2, 0]  # type: ignore[attr-defined]


def test_a_damaged_network_is_named(tmp_path: Path) -> None:
    save_network(tmp_path, ours(), "resnet8")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no usable classifier"):
        load_network(tmp_path)
    (tmp_path / "classifier.json").write_text('{"format": "calib.classifier", "version": "9.0"}')
    with pytest.raises(ArtifactError, match="version"):
        load_network(tmp_path)


def test_a_text_classifier_reads_texts_in_its_own_label_order(text_classifier: Path) -> None:
    found = open_classifier(str(text_classifier), device="cpu")
    records = Records(["the whale", "cold water in silence", "x"], (0, 1, 0), ("storm", "whale"), "texts")
    batch: Any = next(iter(found.loader(found.dataset(records))))
    assert batch["labels"].tolist() == [1, 2, 1]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() != [batch["input_ids"].shape[1]] * 3
    with torch.no_grad():
        together = found.task.decide(found.model, batch).logits
        alone = [found.task.decide(found.model, b).logits for b in found.loader(found.dataset(records), batch_size=1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)  # padding changes nothing


def test_models_and_data_that_do_not_fit_are_refused(tiny_bert: Path, text_classifier: Path) -> None:
    with pytest.raises(UsageError, match="fill-mask"):
        open_classifier(str(tiny_bert), device="cpu")
    with pytest.raises(UsageError, match="4 classes, but ours has 3 outputs"):
        ours().dataset(images(("0", "1", "2", "3")))


@pytest.fixture
def image_classifier(tmp_path: Path) -> Path:
    """Folder of a transformers ResNet for 32 pixels, untrained."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    processor = {"size": {"shortest_edge": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


def test_an_image_classifier_of_transformers_gets_its_own_normalisation_and_has_stages(image_classifier: Path) -> None:
    found = open_classifier(str(image_classifier), device="cpu")
    assert found.image == ImageInput(size=32, mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.25])
    grey = Records([torch.full((1, 8, 8), 255, dtype=torch.uint8)] * 2, (0, 2), ("a", "b", "c"), "images")
    batch = next(iter(found.loader(found.dataset(grey))))
    torch.testing.assert_close(batch[0][0, :, 0, 0], torch.tensor([1.8, 1.6, 2.8]))
    points = find_features(found.model, found.task, batch)
    # the stem lowers the resolution itself, by pooling, so what enters that pooling counts too
    assert points.maps == ("resnet.embedder.embedder", "resnet.encoder.stages.0", "resnet.encoder.stages.1")
    assert points.head == "classifier.1"


def test_an_image_classifier_without_a_known_normalisation_is_refused(image_classifier: Path) -> None:
    (image_classifier / "preprocessor_config.json").write_text('{"size": 32}')
    with pytest.raises(UsageError, match=r"normalised is unknown.*image_mean"):
        open_classifier(str(image_classifier), device="cpu")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_classifier_of_transformers_is_kept_as_transformers_does(
    kind: str, text_classifier: Path, image_classifier: Path, tmp_path: Path
) -> None:
    found = open_classifier(str(text_classifier if kind == "text" else image_classifier), device="cpu")
    keep_model(tmp_path / "kept", found)
    again = open_classifier(str(tmp_path / "kept"), device="cpu")
    assert (again.kind, again.class_names, again.image) == (kind, found.class_names, found.image)
    names = tuple(found.class_names)
    records = images(names) if kind == "image" else Records(["the whale", "silence"], (0, 2), names, "texts")
    batch = next(iter(found.batches(records)))
    with torch.no_grad():
        before, after = (one.task.decide(one.model, batch).logits for one in (found, again))
    assert torch.equal(before, after)
