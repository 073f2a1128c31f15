# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.distill.data import Records
from calib.distill.features import FeaturePoints, find_features, look
from calib.distill.folders import open_classifier
from calib.distill.networks import make_network
from calib.distill.task import ClassificationTask
from calib.errors import UsageError

IMAGES = (torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("name", "channels", "sizes", "head"),
    [
        ("resnet20", [16, 32, 64], [32, 16, 8], "fc"),
        ("wrn_16_2", [32, 64, 128], [32, 16, 8], "fc"),
        ("vgg8", [64, 128, 256, 512], [32, 16, 8, 4], "classifier"),
        ("mobilenetv2", [12, 16, 48, 1280], [32, 16, 8, 4], "classifier"),
        ("shufflenetv2", [24, 116, 232, 1024], [32, 16, 8, 4], "classifier"),
        ("vit_tiny", [128, 128, 128], [64, 64, 64], "head"),
    ],
)
def test_stages_and_heads_are_found_without_being_named(
    name: str, channels: list[int], sizes: list[int], head: str
) -> None:
    model = make_network(name, 5).eval()
    points = find_features(model, ClassificationTask(), IMAGES)
    seen = look(model, ClassificationTask(), IMAGES, points)
    assert points.head == head
    assert [m.shape[1] for m in seen.maps] == channels
    assert [m.shape[2] for m in seen.maps] == sizes
    assert seen.embedding is not None
    layer = model.get_submodule(head)
    torch.testing.assert_close(layer(seen.embedding), seen.logits)


def test_looking_changes_nothing_and_leaves_no_hook() -> None:
    model = make_network("resnet8", 5).eval()
    task = ClassificationTask()
    plain = look(model, task, IMAGES, None)
    seen = look(model, task, IMAGES, find_features(model, task, IMAGES))
    assert torch.equal(plain.logits, seen.logits)
    assert plain.maps == ()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UsageError, match="feature point"):
        look(model, task, IMAGES, FeaturePoints(("layer9",), "fc"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_padding_of_texts_is_zero_in_the_maps(text_classifier: Path) -> None:
    classifier = open_classifier(str(text_classifier), device="cpu")
    records = Records(["the whale in the cold water", "x"], (0, 1), ("calm", "storm"), "texts")
    batch = next(iter(classifier.loader(classifier.dataset(records))))
    points = find_features(classifier.model, classifier.task, batch)
    seen = look(classifier.model, classifier.task, batch, points)
    assert len(seen.maps) == 2
    assert points.head == "classifier"
    hidden = batch["attention_mask"] == 0
    assert hidden.any()
    for found in seen.maps:
        assert found.shape == (2, 64, batch["input_ids"].shape[1], 1)
        assert bool((found[..., 0].transpose(1, 2)[hidden] == 0).all())
        assert bool((found[..., 0].transpose(1, 2)[~hidden] != 0).any())
