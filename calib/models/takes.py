# SPDX-License-Identifier: Apache-2.0
"""What a model takes, read from its forward pass: text, pictures, sound; and whether a decoder writes beside them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from calib.models.device import input_device

__all__ = ["generates", "parameters_of", "takes", "text_inputs", "writes"]

_KINDS = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}


def takes(model: nn.Module) -> frozenset[str]:
    """The kinds of input, of text, image and audio."""
    parameters = inspect.signature(model.forward).parameters
    return frozenset(kind for name, kind in _KINDS.items() if name in parameters)


def parameters_of(model: nn.Module) -> frozenset[str] | None:
    """Names that the forward pass takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def generates(model: nn.Module) -> bool:
    """Whether the model writes text, token by token."""
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can())


def writes(model: nn.Module) -> bool:
    """Whether a decoder with tokens of its own writes what the model is asked for."""
    config = getattr(model, "config", None)
    return (
        bool(getattr(config, "is_encoder_decoder", False))
        and "decoder_input_ids" in inspect.signature(model.forward).parameters
        and generates(model)
    )


def text_inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass over text: the decoder of an encoder-decoder reads the same tokens.

    Not every decoder makes up what it reads (BART does, T5 does not).

    Args:
        model: reads token ids.
        ids: int64 ``[rows, tokens]``, on any device.
    """
    inputs = {"input_ids": ids.to(input_device(model))}
    if writes(model):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
