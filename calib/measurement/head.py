# SPDX-License-Identifier: Apache-2.0
"""How a model is run to be measured: in evaluation mode, and without a head whose input is what matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from calib.models.takes import text_inputs

__all__ = ["can_skip_head", "head_of", "takes_cache", "without_head"]


def head_of(model: nn.Module) -> nn.Linear | None:
    """The output embedding of a language model, if it is a linear layer."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Linear) else None


@contextmanager
def without_head(model: nn.Module) -> Iterator[None]:
    """Within the block the head returns logits over an empty vocabulary; hooks on its input fire as always."""
    head = head_of(model)
    if head is None:
        yield
        return
    held = head.__dict__.get("forward")
    head.forward = _empty_logits  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if held is None:
            del head.__dict__["forward"]
        else:
            head.forward = held  # type: ignore[method-assign]


def _empty_logits(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], 0)


def can_skip_head(model: nn.Module, device: torch.device) -> bool:
    """Whether the model's own code accepts logits over an empty vocabulary, tried on two tokens."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    if head_of(model) is None:
        return False
    try:
        with torch.no_grad(), without_head(model):
            model(**text_inputs(model, tokens), **({"use_cache": False} if takes_cache(model) else {}))
    except Exception:  # of any model class: it may want other inputs, or use the logits
        return False
    return True


def takes_cache(model: nn.Module) -> bool:
    """Whether `use_cache` means something to a model."""
    return bool(getattr(model, "_supports_cache_class", False)) or hasattr(getattr(model, "config", None), "use_cache")
