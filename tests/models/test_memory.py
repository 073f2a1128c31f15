# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.errors import ModelError
from calib.models import memory, open_model
from calib.models.checkpoint import TensorHeader, read_checkpoint, read_headers


@pytest.mark.parametrize(("dtype", "item"), [(None, 4), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_the_prediction_is_the_size_of_the_parameters(tiny_llama: Path, dtype: torch.dtype | None, item: int) -> None:
    checkpoint = read_checkpoint(tiny_llama, "tiny")
    parameters = sum(p.numel() for p in open_model(tiny_llama, device="cpu").model.parameters())
    assert memory.predicted_bytes(checkpoint, read_headers(checkpoint, "tiny"), dtype) == parameters * item


def test_integers_keep_their_size_and_pickles_count_their_files(rxnmapper: Path, tiny_llama: Path) -> None:
    packed = [TensorHeader("q", "I8", (4, 4)), TensorHeader("s", "F32", ()), TensorHeader("n", "I64", (2,))]
    checkpoint = read_checkpoint(tiny_llama, "tiny")
    assert memory.predicted_bytes(checkpoint, packed, torch.bfloat16) == 16 + 2 + 16
    pickled = read_checkpoint(rxnmapper, "rxnmapper")
    assert read_headers(pickled, "rxnmapper") == []
    assert memory.predicted_bytes(pickled, [], None) == (rxnmapper / "pytorch_model.bin").stat().st_size


def test_available_memory_is_less_than_there_is() -> None:
    import os

    assert 0 < memory.available_bytes("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 150000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes("cpu") > 10**6
    (tmp_path / "memory.max").write_text("400000\n")
    assert memory.available_bytes("cpu") == 250_000
    with pytest.raises(ModelError, match=r"on cpu, 0.0 GB are available; pass --dtype bfloat16 \(0.0 GB\) or --device"):
        open_model(tiny_llama, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", "balanced"])
def test_available_memory_of_a_gpu_is_less_than_it_has(device: str) -> None:
    total = sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    assert 0 < memory.available_bytes(device) <= total
