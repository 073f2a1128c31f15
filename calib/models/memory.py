# SPDX-License-Identifier: Apache-2.0
"""Predict whether a model fits before it is loaded: a process that is killed explains nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from calib.errors import ModelError
from calib.models.checkpoint import Checkpoint, TensorHeader

__all__ = ["available_bytes", "check_memory", "predicted_bytes"]

# safetensors' names -> bytes per element; everything else that is stored counts one byte.
ITEM_SIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
CONVERTED = {"F64", "F32", "F16", "BF16"}
CGROUP = Path("/sys/fs/cgroup")


def predicted_bytes(checkpoint: Checkpoint, headers: Sequence[TensorHeader], dtype: torch.dtype | None) -> int:
    """Bytes of all weights once loaded as `dtype` (None: as stored). Pickled files count their own size."""
    if not headers:
        return sum(path.stat().st_size for path in checkpoint.weight_files)
    total = 0
    for header in headers:
        elements = 1
        for size in header.shape:
            elements *= size
        converted = dtype is not None and header.dtype in CONVERTED
        total += elements * (dtype.itemsize if converted and dtype is not None else ITEM_SIZE.get(header.dtype, 1))
    return total


def available_bytes(device: str) -> int:
    """Bytes that can still be allocated on `cpu`, one CUDA device, or all of them together (`balanced`)."""
    if device == "balanced":
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min(_system_bytes(), _cgroup_bytes())


def check_memory(
    checkpoint: Checkpoint, headers: Sequence[TensorHeader], dtype: torch.dtype | None, device: str, name: str
) -> None:
    """Refuse a model whose weights alone exceed what is available.

    Raises:
        ModelError: with the predicted and the available bytes and the flags that help.
    """
    needed, available = predicted_bytes(checkpoint, headers, dtype), available_bytes(device)
    if needed <= available:
        return
    smaller = predicted_bytes(checkpoint, headers, torch.bfloat16)
    helps = [f"--dtype bfloat16 ({smaller / 1e9:.1f} GB)"] if smaller < needed else []
    if device != "balanced":
        helps.append("--device with more memory" if device != "cpu" else "--device cuda or --device balanced")
    raise ModelError(
        f"model {name}: its weights need {needed / 1e9:.1f} GB on {device}, {available / 1e9:.1f} GB are available; "
        f"pass {' or '.join(helps) or 'a smaller model'}"
    )


def _system_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # No /proc (macOS): physical memory is the best known bound; free pages alone would forget the page cache.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes() -> int:
    """What the limit of a container leaves, page cache that can be dropped not counted."""
    unlimited = 1 << 62
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return unlimited
        current = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(limit) - current + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return unlimited
