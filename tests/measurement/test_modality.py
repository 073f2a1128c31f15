# SPDX-License-Identifier: Apache-2.0
"""Images and text: their tokens are kept apart, and a tower that saw nothing closes the gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import tiny_models
from calib.corpus import TokenBlocks
from calib.measurement import Calibration, Measurement, MeasureOptions, measure
from calib.models import OpenedModel

VISION = [
    ("LlavaForConditionalGeneration", "llava"),
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl"),
    ("Gemma3ForConditionalGeneration", "gemma3"),
]


@pytest.mark.parametrize(("class_name", "model_type"), VISION)
def test_image_tokens_and_text_tokens_are_kept_apart(class_name: str, model_type: str) -> None:
    model = tiny_models.build(class_name, model_type)
    for inputs in tiny_models.inputs_of(model, "image-text"):
        try:
            with torch.no_grad():
                expected = model(**inputs).logits
        except (RuntimeError, ValueError):
            continue
        break
    assert "pixel_values" in inputs
    config = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index  # type: ignore[union-attr]
    image = (inputs["input_ids"] == token).numpy()
    with torch.no_grad(), Calibration(model) as calibration:
        assert torch.equal(model(**inputs).logits, expected)
    sites = calibration.sites()
    assert all(gate.passed for gate in calibration.gates())
    apart = [site for site in sites.values() if site.parts]
    assert len(apart) > 10
    for site in apart:
        assert set(site.parts) == {"text", "image"}
        counts = {name: part.range.count_all for name, part in site.parts.items()}
        assert counts == {"image": image.sum() * site.channels, "text": (~image).sum() * site.channels}
        whole = site.parts["text"].merge(site.parts["image"])
        assert {k: a.tobytes() for k, a in whole.to_tensors().items()} == {
            k: a.tobytes() for k, a in site.statistics.to_tensors().items()
        }
        peaks = site.parts["image"].peaks
        assert peaks is not None
        assert set(peaks.token_id.tolist()) <= {token}  # a placeholder's own embedding may be zero
    towers = [site for name, site in sites.items() if "vision" in name or "visual" in name]
    assert towers
    assert not any(site.parts for site in towers)


def test_text_alone_closes_the_gate_and_names_the_tower() -> None:
    model = tiny_models.build("LlavaForConditionalGeneration", "llava")
    with torch.no_grad(), Calibration(model) as calibration:
        model(input_ids=torch.randint(3, 119, (2, 12)))
    gates = {gate.name: gate for gate in calibration.gates()}
    assert not gates["every_modality"].passed
    assert gates["every_modality"].names == ("model.vision_tower",)
    assert "model.vision_tower" in gates["every_modality"].detail
    assert "image" in gates["every_modality"].detail


def test_modalities_survive_a_round_trip_and_a_merge(llama: OpenedModel, blocks: TokenBlocks, tmp_path: Path) -> None:
    model = tiny_models.build("LlavaForConditionalGeneration", "llava")
    opened = replace(llama, model=model, tokenizer=None)
    options = MeasureOptions(batch_size=2, weights=False)
    blocks = replace(blocks, input_ids=blocks.input_ids % 100 + 3)
    whole = measure(opened, blocks, options)
    assert not whole.passed
    shards = [measure(opened, blocks, replace(options, shard=(i, 2))) for i in range(2)]
    merged = shards[1].merge(shards[0])
    assert merged.sha256 == whole.sha256
    merged.save(tmp_path / "m")
    loaded = Measurement.load(tmp_path / "m")
    assert loaded.sha256 == whole.sha256
    site = next(s for s in loaded.sites.values() if s.parts)
    assert np.array_equal(site.parts["text"].range.minimum, site.statistics.range.minimum)


def test_a_tower_that_nobody_asked_for_may_be_silent() -> None:
    model = tiny_models.build("LlavaForConditionalGeneration", "llava")
    with (
        torch.no_grad(),
        Calibration(model, ignore=["model.vision_tower", "model.multi_modal_projector"]) as calibration,
    ):
        model(input_ids=torch.randint(3, 119, (2, 12)))
    assert all(gate.passed for gate in calibration.gates())
