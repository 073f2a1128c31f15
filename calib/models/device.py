# SPDX-License-Identifier: Apache-2.0
"""`choose_device`: where a model goes; `input_device`: where its inputs do."""

from __future__ import annotations

import torch
from torch import nn

from calib.errors import UsageError

__all__ = ["choose_device", "input_device"]


def input_device(model: nn.Module) -> torch.device:
    """The device of the input embedding, or of the first parameter: a model may be spread over several devices."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight.device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def choose_device(device: str) -> str:
    """Resolves `auto`, and refuses what is not there, before anything is downloaded.

    Args:
        device: auto, cpu, cuda, cuda:N or balanced.

    Raises:
        UsageError: an unknown device, or one that PyTorch does not see.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if count else "cpu"
    kind, _, index = device.partition(":")
    if device == "cpu":
        return device
    if device not in {"cuda", "balanced"} and not (kind == "cuda" and index.isdigit()):
        raise UsageError(f"device {device!r}: unknown; choose auto, cpu, cuda, cuda:N or balanced")
    if int(index or 0) >= count:
        raise UsageError(f"device {device}: PyTorch sees {count} CUDA devices; pass --device cpu or another index")
    return "cuda:0" if device == "cuda" else device
