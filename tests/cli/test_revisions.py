# SPDX-License-Identifier: Apache-2.0
"""Several checkpoints of one model, measured on the same token blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.measurement import Measurement
from tests.cli.commands import SMALL, one_line, run


@pytest.fixture
def training(tiny_llama: Path, tmp_path: Path) -> Path:
    """Two steps of a training run: in the second one projection is ten times as large."""
    for step, factor in (("step1", 1.0), ("step2", 10.0)):
        shutil.copytree(tiny_llama, tmp_path / "run" / step)
        weights = tmp_path / "run" / step / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.down_proj.weight"] *= factor
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    assert torch.isfinite(tensors["model.layers.1.mlp.down_proj.weight"]).all()
    return tmp_path / "run"


def test_each_revision_is_measured_on_the_same_blocks(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--revisions", "step1,step2", "-o", tmp_path / "m", *SMALL, "--json"]
    assert run("measure", training, *options) == 0
    rows = json.loads(capsys.readouterr().out)["revisions"]
    held = {name: Measurement.load(tmp_path / "m" / name) for name in ("step1", "step2")}
    assert held["step1"].corpus.content_sha256 == held["step2"].corpus.content_sha256
    site = "model.layers.1.mlp.down_proj:output"
    first, second = (held[name].sites[site].statistics.range.amax for name in ("step1", "step2"))
    assert second == pytest.approx(10 * first, rel=1e-5)
    for row in rows:
        sites = held[row["revision"]].sites
        assert (
            row["peak"]
            == max(s.statistics.range.amax for s in sites.values())
            == sites[row["site"]].statistics.range.amax
        )


@pytest.mark.parametrize("revisions", ["step1", "step1,step1"])
def test_one_revision_is_no_series(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], revisions: str
) -> None:
    assert run("measure", training, "--revisions", revisions, "-o", tmp_path / "m", *SMALL) == 2
    assert f"--revisions {revisions}" in one_line(capsys.readouterr().err)
