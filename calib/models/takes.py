# SPDX-License-Identifier: Apache-2.0
"""What a model takes, read from its forward pass: text, pictures, sound; and whether a decoder writes beside them."""

from __future__ import annotations

import inspect

from torch import nn

__all__ = ["parameters_of", "takes", "writes"]

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


def writes(model: nn.Module) -> bool:
    """Whether a decoder with tokens of its own writes what the model is asked for."""
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    return (
        bool(getattr(config, "is_encoder_decoder", False))
        and "decoder_input_ids" in inspect.signature(model.forward).parameters
        and can is not None
        and bool(can())
    )
