# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from calib.corpus import build_blocks
from calib.measurement import Measurement, MeasureOptions, measure
from calib.models import open_model
from tests.cli.commands import SMALL, one_line, run


@pytest.fixture
def interrupted(tiny_llama: Path, tmp_path: Path) -> Path:
    """One of two batches, as SIGINT leaves it."""
    opened = open_model(str(tiny_llama))
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=8, max_length=32)
    held = measure(opened, blocks, MeasureOptions(batch_size=4), should_stop=lambda: True)
    held.save(tmp_path / "measured")
    return tmp_path / "measured"


def test_resume_equals_a_run_without_a_break(interrupted: Path, tiny_llama: Path, measured: Path) -> None:
    assert len(Measurement.load(interrupted).run.batches) == 1
    assert run("measure", tiny_llama, "-o", interrupted, *SMALL, "--resume", "-q") == 0
    whole = Measurement.load(measured)
    assert Measurement.load(interrupted).sha256 == whole.sha256
    assert Measurement.load(interrupted).run.batches == whole.run.batches
    assert Measurement.load(interrupted).passed


def test_resume_of_nothing_measures_everything(tiny_llama: Path, tmp_path: Path, measured: Path) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "new", *SMALL, "--resume", "-q") == 0
    assert Measurement.load(tmp_path / "new").sha256 == Measurement.load(measured).sha256


def test_resume_refuses_other_data_another_model_and_a_complete_run(
    interrupted: Path, tiny_llama: Path, tiny_gpt2: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (interrupted / "measurement.json").read_bytes()
    assert run("measure", tiny_llama, "-o", interrupted, *SMALL, "--seed", 5, "--resume", "-q") == 1
    assert "other token blocks" in one_line(capsys.readouterr().err)
    assert run("measure", tiny_gpt2, "-o", interrupted, *SMALL, "--resume", "-q") == 1
    assert "another model" in one_line(capsys.readouterr().err)
    assert run("measure", tiny_llama, "-o", measured, *SMALL, "--resume", "-q") == 2
    assert "nothing is left to resume" in one_line(capsys.readouterr().err)
    assert run("measure", tiny_llama, "-o", interrupted, *SMALL, "--resume", "--overwrite", "-q") == 2
    assert "contradict" in one_line(capsys.readouterr().err)
    assert (interrupted / "measurement.json").read_bytes() == before
