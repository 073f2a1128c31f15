# SPDX-License-Identifier: Apache-2.0
"""Modules that transformers does not know, and real models with shared layers or convolutions."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calib.measurement import Calibration
from calib.models import open_model
from tests.measurement.functional_probe import Extent, functional_probe


def compare(model: nn.Module, data: torch.Tensor) -> Calibration:
    """Measures a module; its convolutions and projections have the range that the functions were given."""
    with torch.no_grad():
        with functional_probe(model) as seen:
            expected = model(data)
        with Calibration(model) as calibration:
            assert torch.equal(model(data), expected)
    named = {name: s for s in calibration.sites().values() for name in (s.name, *s.aliases)}
    assert seen.reads
    for name, extent in seen.reads.items():
        span = named[f"{name}:input"].statistics.range
        assert Extent(span.min, span.max, span.count_all) == extent, name
    for name, extent in seen.makes.items():
        span = named[f"{name}:output"].statistics.range
        assert Extent(span.min, span.max, span.count_all) == extent, name
    assert all(gate.passed for gate in calibration.gates())
    return calibration


def test_convolutions_norms_and_a_head_of_a_plain_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    sites = compare(model, torch.randn(2, 3, 12, 12)).sites()
    channels = sites["0:input"].statistics.channels
    assert channels is not None
    assert channels.minimum.shape == (2, 3)


@pytest.mark.slow
def test_efficientnet_lite_on_photographs(fetch_asset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its convolutions pad inside: the functions are given zeros that the modules are not."""
    import numpy as np
    from PIL import Image

    monkeypatch.syspath_prepend(str(fetch_asset("efficientnet-lite-code")))
    package = importlib.import_module("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(fetch_asset("efficientnet-lite0"), weights_only=True))
    model.eval()
    photos = [fetch_asset("photos-scikit-image") / name for name in ("chelsea.png", "coffee.png", "astronaut.png")]
    pixels = [np.array(Image.open(photo).convert("RGB").resize((224, 224)), np.float32) for photo in photos]
    data = torch.from_numpy((np.stack(pixels) - 127) / 128).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        with functional_probe(model) as seen:
            expected = model(data)
        with Calibration(model) as calibration:
            assert torch.equal(model(data), expected)
    assert expected.argmax(1)[0].item() in (281, 282, 285)  # a cat
    assert all(gate.passed for gate in calibration.gates())
    named = {name: s for s in calibration.sites().values() for name in (s.name, *s.aliases)}
    assert len(seen.reads) == 50
    for name in seen.reads:
        read, made = (named[f"{name}:{port}"].statistics.range for port in ("input", "output"))
        extent = seen.reads[name]
        assert (min(read.min, 0.0), max(read.max, 0.0)) == (min(extent.low, 0.0), max(extent.high, 0.0)), name
        assert Extent(made.min, made.max, made.count_all) == seen.makes[name], name


@pytest.mark.slow
def test_albert_has_a_site_per_call_of_its_one_layer(rxnmapper: Path) -> None:
    opened = open_model(rxnmapper, device="cpu")
    ids = torch.randint(5, 60, (4, 40), generator=torch.Generator().manual_seed(0))
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    seen: dict[str, list[tuple[float, float]]] = {}
    handles = [
        opened.model.get_submodule(f"{layer}.{name}").register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(
                (args[0].min().item(), args[0].max().item())
            )
        )
        for name in ("ffn", "ffn_output", "attention.dense")
    ]
    with torch.no_grad(), Calibration(opened.model) as calibration:
        opened.model(ids)
    for handle in handles:
        handle.remove()
    named = {name: s for s in calibration.sites().values() for name in (s.name, *s.aliases)}
    for name, extents in seen.items():
        assert len(extents) == 12
        for call, extent in enumerate(extents):
            span = named[f"{layer}.{name}:input#{call}"].statistics.range
            assert (span.min, span.max) == extent
