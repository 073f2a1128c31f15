# SPDX-License-Identifier: Apache-2.0
"""When the model's own code fails the user reads one line: what, why, and which flag helps."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from calib.corpus import TokenBlocks
from calib.errors import ArtifactError, ModelError
from calib.measurement import Measurement, MeasureOptions, artifact, measure
from calib.measurement.failure import explained
from calib.models import OpenedModel, open_model

CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((9,), np.dtype(np.float64)),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError(CPU),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_batch_the_weights_and_the_flags(
    error: Exception, tiny_llama: Path, blocks: TokenBlocks
) -> None:
    opened = open_model(tiny_llama, device="cpu")

    def fail(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.shape[0] > 1:  # a small probe still fits
            raise error

    opened.model.get_submodule("model.layers.1.mlp").register_forward_hook(fail)
    with pytest.raises(ModelError) as caught:
        measure(opened, blocks, MeasureOptions(batch_size=4))
    assert str(caught.value) == (
        f"{tiny_llama.name}: out of memory in a batch of 4 x 24 tokens, beside 0.0 GB of weights; "
        "pass --batch-size 2 or --dtype bfloat16 or --statistics ranges"
    )
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is error
    assert not any(module._forward_pre_hooks for module in opened.model.modules())


def test_the_weights_are_predicted_from_what_is_loaded(llama: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.nn.Parameter(torch.empty(3_000_000_000, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    monkeypatch.setattr(llama.model, "parameters", lambda: iter([large]))
    says = r"beside 6\.0 GB of weights; pass --max-length 256 or --statistics ranges$"
    with pytest.raises(ModelError, match=says), explained(llama, (1, 512)):
        raise MemoryError
    says = r"beside 6\.0 GB of weights; pass --max-length 256$"
    with pytest.raises(ModelError, match=says), explained(llama, (1, 512), measuring=False):
        raise MemoryError


def test_out_of_memory_among_the_weights_says_so(
    llama: OpenedModel, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("calib.measurement.engine.measure_weights", fail)
    with pytest.raises(ModelError, match="out of memory while its weights were measured"):
        measure(llama, blocks, MeasureOptions(batch_size=4))


def test_more_tokens_than_positions_point_at_max_length(tiny_gpt2: Path, blocks: TokenBlocks) -> None:
    opened = open_model(tiny_gpt2, device="cpu")
    long = replace(
        blocks,
        input_ids=np.zeros((1, 513), np.int64),
        lengths=np.array([513]),
        document=np.zeros(1, np.int64),
        domain=np.zeros(1, np.int64),
    )
    with pytest.raises(ModelError, match=r"failed on token ids 1 x 513 \(index out of range.*--max-length"):
        measure(opened, long, MeasureOptions(batch_size=1))


def test_a_model_that_takes_no_token_ids_is_one_line(llama: OpenedModel, blocks: TokenBlocks) -> None:
    opened = replace(llama, model=torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="that the model takes token ids") as caught:
        measure(opened, blocks, MeasureOptions(batch_size=1))
    assert "\n" not in str(caught.value)


def test_an_error_of_calib_keeps_its_own_words(tiny_llama: Path, blocks: TokenBlocks) -> None:
    opened = open_model(tiny_llama, device="cpu")
    opened.model.double()
    with pytest.raises(ModelError, match="float64 activations are not supported"):
        measure(opened, blocks, MeasureOptions(batch_size=1))


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("fail", "says"), [(full_disk, "disk is full"), (full_disk_in_rust, "No space left")])
def test_a_full_disk_is_one_line_and_nothing_half_written(
    whole: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any, says: str
) -> None:
    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises(ArtifactError, match=says) as caught:
        whole.save(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "free some space" in str(caught.value)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_before_the_second_file_keeps_the_old_measurement(
    whole: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole.save(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(ArtifactError, match="disk is full"):
        whole.save(tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
