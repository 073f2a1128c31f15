# SPDX-License-Identifier: Apache-2.0
"""`trial_inputs`: something that a model runs on, made from its configuration alone, for a consumer to run on too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError
from calib.export.compare import token_ids

__all__ = ["trial_inputs"]

_DECODED = 8  # tokens that a decoder reads
_SAMPLES = 16_000  # of sound, a second at the usual rate


def trial_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward pass, the same in every run.

    Token ids; where a model does not run on those alone, also what its decoder reads, and noise for pictures or sound
    in the sizes of its configuration.

    Args:
        model: of transformers, in evaluation mode, on the CPU.

    Raises:
        ModelError: it runs on nothing of the kind.
    """
    reasons = []
    for inputs in _candidates(model):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # each model class has its own ways to refuse
            reasons.append(f"{', '.join(inputs)}: {' '.join(str(error).split())[:100]}")
            continue
        return inputs
    why = "; ".join(reasons) or "it takes neither token ids nor pictures nor sound"
    raise ModelError(f"{type(model).__name__}: no inputs could be made up that it runs on ({why}); pass --no-run")


def _candidates(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The plainest first."""
    whole: Any = model
    accepted = inspect.signature(model.forward).parameters
    ids = token_ids(model) if hasattr(whole.config.get_text_config(), "vocab_size") else None
    text = {} if ids is None or "input_ids" not in accepted else {"input_ids": ids}
    decoder = {} if ids is None or "decoder_input_ids" not in accepted else {"decoder_input_ids": ids[:, :_DECODED]}
    media = [one for one in _media(whole.config) if set(one) <= set(accepted)]
    tried = [text, text | decoder, *(text | one for one in media), *media, *(one | decoder for one in media)]
    seen: list[dict[str, torch.Size]] = [{}]
    for inputs in tried:
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        if shapes not in seen:
            seen.append(shapes)
            yield inputs


def _media(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = _field(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    yield {"pixel_values": torch.randn(2, _field(config, "num_channels", 3), height, width, generator=generator)}
    bands = _field(config, "num_mel_bins", 80)
    frames = 2 * _field(config, "max_source_positions", 1500)
    yield {"input_features": torch.randn(2, bands, frames, generator=generator)}
    yield {"input_features": torch.randn(2, frames, bands, generator=generator)}
    yield {"input_values": torch.randn(2, _SAMPLES, generator=generator)}


def _field(config: Any, name: str, default: int) -> Any:
    """A field of a configuration, or of one inside it."""
    for one in (config, *(getattr(config, inner, None) for inner in ("vision_config", "audio_config"))):
        value = getattr(one, name, None)
        if value is not None:
            return value
    return default
