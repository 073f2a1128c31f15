# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from calib.distill.networks import NETWORKS, make_network
from calib.errors import UsageError

# parameters with 100 classes and 3 channels, in millions: tables of the papers and of the CRD benchmark
PUBLISHED = {
    "resnet20": 0.28,
    "resnet56": 0.86,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_2": 0.70,
    "wrn_40_2": 2.26,
}


@pytest.mark.parametrize("name", sorted(n for n in NETWORKS if n not in ("resnet110", "vgg19", "resnet44")))
def test_every_network_classifies_images_and_learns_from_them(name: str) -> None:
    torch.manual_seed(0)
    model = make_network(name, 7, channels=1, size=32)
    logits = model(torch.randn(4, 1, 32, 32))
    assert logits.shape == (4, 7)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_sizes_are_the_published_ones(name: str, millions: float) -> None:
    count = sum(p.numel() for p in make_network(name, 100).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_an_unknown_name_and_an_impossible_size_are_refused() -> None:
    with pytest.raises(UsageError, match="resnet20"):
        make_network("resnet21", 10)
    with pytest.raises(UsageError, match="multiple of 4"):
        make_network("vit_tiny", 10, size=30)
