# SPDX-License-Identifier: Apache-2.0
"""A measurement on disk is deterministic, complete and refuses damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.corpus import build_blocks
from calib.errors import ArtifactError, UsageError
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import open_model


def measured(folder: Path, tmp_path: Path) -> Measurement:
    text = tmp_path / "text.txt"
    text.write_text("The whale swam through the cold water. " * 40)
    opened = open_model(str(folder))
    blocks = build_blocks([str(text)], opened.tokenizer, samples=4, max_length=32)
    return measure(opened, blocks, MeasureOptions(batch_size=1))


def test_two_runs_are_byte_equal_and_damage_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for name in "ab":
        measured(tiny_llama, tmp_path).save(tmp_path / name)
    first, second = (tmp_path / name / "measurement.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    held = Measurement.load(tmp_path / "a")
    with pytest.raises(UsageError):
        held.save(tmp_path / "a")
    held.save(tmp_path / "a", overwrite=True)
    assert first.read_bytes() == second.read_bytes()
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        Measurement.load(tmp_path / "a")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        Measurement.load(tmp_path / "none")
