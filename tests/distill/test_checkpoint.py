# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.distill.checkpoint import Checkpoint
from calib.errors import ArtifactError


def test_what_is_saved_comes_back_with_its_types(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.load() is None
    tied = torch.arange(4.0)
    state = {
        "tensor": torch.randn(2, 3).t(),
        "shared": [tied, tied[1:]],
        "empty": torch.zeros(0),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "numbers": {0: 0.1 + 0.2, 7: None, "x": True},
        "nan": float("inf"),
        "tuple": (1, "two"),
        "keys": {"keys": 1, "tensor": 2},
    }
    checkpoint.save(state)
    found = checkpoint.load()
    assert found is not None
    assert torch.equal(found["tensor"], state["tensor"])  # type: ignore[arg-type]
    assert torch.equal(found["shared"][1], tied[1:])
    assert found["scalar"].dtype == torch.int64
    assert found["scalar"].shape == ()
    assert found["numbers"] == state["numbers"]
    assert found["nan"] == float("inf")
    assert found["tuple"] == [1, "two"]
    assert found["keys"] == {"keys": 1, "tensor": 2}


def test_a_save_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    checkpoint.save({"n": 1})
    (tmp_path / "a.safetensors.writing").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written"):
        checkpoint.save({"n": 2})
    assert checkpoint.load() == {"n": 1}


def test_it_is_due_when_it_has_grown_old(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "a", seconds=0.0).due()
    assert not Checkpoint(tmp_path / "a", seconds=60.0).due()
