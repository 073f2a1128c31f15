# SPDX-License-Identifier: Apache-2.0
"""A smoothing is recorded for scales.json and can be stored, read and applied again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from calib.cures import Smoothing, load_smoothing, save_smoothing, smoothing_record
from calib.errors import ArtifactError
from calib.schema.scales import CureRecord
from tests.cures.models import build, logits, pairs_of


@pytest.fixture
def smoothing() -> Smoothing:
    pairs = pairs_of("phi3")
    rng = np.random.default_rng(0)
    scales = tuple(np.exp(rng.uniform(-1, 1, pair.channels)).astype(np.float32) for pair in pairs)
    return Smoothing(pairs.pairs, (0.7, 0.8, 0.9, 0.5) * 2, scales, include_sink=False)


def test_a_stored_smoothing_does_the_same(smoothing: Smoothing, tmp_path: Path) -> None:
    save_smoothing(smoothing, tmp_path / "smooth.safetensors")
    loaded = load_smoothing(tmp_path / "smooth.safetensors")
    assert loaded.alphas == smoothing.alphas
    assert loaded.include_sink is False
    assert smoothing_record(loaded) == smoothing_record(smoothing)
    first, second = build("phi3"), build("phi3")
    smoothing.apply(first)
    loaded.apply(second)
    torch.testing.assert_close(logits(first), logits(second), rtol=0, atol=0)


def test_the_record_names_the_alpha_of_each_pair_and_knows_its_scales(smoothing: Smoothing) -> None:
    record = smoothing_record(smoothing)
    assert CureRecord.model_validate_json(record.model_dump_json()) == record
    assert record.kind == "smooth"
    assert record.needs == "nothing"
    alphas = record.settings["alphas"]
    assert isinstance(alphas, dict)
    assert list(alphas)[1] == "model.layers.0.self_attn.qkv_proj[96:128]"
    assert alphas["model.layers.0.self_attn.qkv_proj[96:128]"] == 0.8
    smoothing.scales[3][0] *= 2
    assert smoothing_record(smoothing).settings["scales_sha256"] != record.settings["scales_sha256"]


def test_one_alpha_for_all_is_said_as_one_number(smoothing: Smoothing) -> None:
    uniform = Smoothing(smoothing.pairs, (0.8,) * len(smoothing.pairs), smoothing.scales)
    assert "(alpha 0.8)" in smoothing_record(uniform).summary


def test_other_files_are_refused(smoothing: Smoothing, tmp_path: Path) -> None:
    path = tmp_path / "smooth.safetensors"
    with pytest.raises(ArtifactError, match="is no readable safetensors file"):
        load_smoothing(path)
    path.write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="is no readable safetensors file"):
        load_smoothing(path)
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(ArtifactError, match="holds no smoothing"):
        load_smoothing(path)
    save_file({"a": np.zeros(2)}, path, metadata={"smoothing": '{"format": "calib.smoothing", "version": "9.0"}'})
    with pytest.raises(ArtifactError, match=r"has version 9.0, this calib reads 1.0"):
        load_smoothing(path)
    head = '{"format": "calib.smoothing", "version": "1.0", "include_sink": true, "pairs": [{"producer": "a"}]}'
    save_file({"a": np.zeros(2)}, path, metadata={"smoothing": head})
    with pytest.raises(ArtifactError, match="pairs"):
        load_smoothing(path)


def test_a_failed_write_leaves_no_half_file(
    smoothing: Smoothing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calib.cures.record.save_file", full)
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_smoothing(smoothing, tmp_path / "smooth.safetensors")
    assert list(tmp_path.iterdir()) == []
