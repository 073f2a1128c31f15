# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of error-compensated weights: written by `calib quantize`, exported, and checked weight by weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.scales import load_scales
from tests.cli.commands import SMALL, run

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compensated") / "int8"
    assert run("quantize", tiny_llama, "-o", out, *SMALL, "--cure", "compensate", "--target", 1.0, "-q") == 0
    assert [cure.kind for cure in load_scales(out).cures] == ["compensate"]
    return out


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "checkpoint"
    assert run("export", quantized, "--to", "compressed-tensors", "--model", tiny_llama, "-o", out, "-q") == 0
    return out


@pytest.mark.parametrize("folder", ["quantized", "exported"])
def test_both_checkpoints_pass(folder: str, request: pytest.FixtureRequest) -> None:
    assert run("verify", request.getfixturevalue(folder), "-q") == 0


@pytest.mark.parametrize("folder", ["quantized", "exported"])
@pytest.mark.parametrize(
    "change",
    [lambda codes: codes - codes.sign() * (codes.abs() == 1), lambda codes: codes.roll(1, 0)],
    ids=["the smallest codes", "rows"],
)
def test_codes_of_another_rounding_are_found(
    folder: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(request.getfixturevalue(folder), damaged)
    state = load_file(damaged / "model.safetensors")
    state[WEIGHT] = change(state[WEIGHT])
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", damaged) == 3
    assert f"{WEIGHT}: is not the one that was rounded with error compensation" in capsys.readouterr().out
