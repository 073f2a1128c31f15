# SPDX-License-Identifier: Apache-2.0
"""`input_device`: where the inputs of a model go."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["input_device"]


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
