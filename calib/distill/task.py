# SPDX-License-Identifier: Apache-2.0
"""What a batch means: how a model turns it into logits and labels, one row per decision, whatever the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calib.errors import ModelError, UsageError
from calib.models.device import input_device
from calib.models.reason import reason

__all__ = ["IGNORED", "CausalLanguageTask", "ClassificationTask", "Decisions", "Task", "TokenTask", "split_batch"]

IGNORED = -100
"""Label of a position that has none, as in transformers."""


@dataclass(frozen=True)
class Decisions:
    """Logits `[n, C]`, labels int64 `[n]`, and the number of each sample in its data set int64 `[n]`, or None."""

    logits: Tensor
    labels: Tensor
    index: Tensor | None = None


class Task(Protocol):
    """Runs a model on a batch and lines up logits and labels."""

    @property
    def name(self) -> str:
        """Name of the task."""
        ...

    def decide(self, model: nn.Module, batch: Any) -> Decisions:
        """Forward pass; gradients flow unless the caller forbids them."""
        ...


@dataclass(frozen=True)
class ClassificationTask:
    """One label per sample: images, texts, anything with logits `[n, C]`."""

    name: str = "classification"

    def decide(self, model: nn.Module, batch: Any) -> Decisions:
        """Logits `[n, C]` and labels `[n]`."""
        inputs, labels, index = split_batch(batch, input_device(model))
        logits = _logits(model, inputs)
        if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise UsageError(
                f"classification: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} of {labels.dtype}; "
                "one integer label per sample is needed (no regression, no multi-label)"
            )
        return Decisions(logits, labels, index)


@dataclass(frozen=True)
class CausalLanguageTask:
    """The class of a position is the token that follows it."""

    name: str = "causal-language-modeling"

    def decide(self, model: nn.Module, batch: Any) -> Decisions:
        """Logits `[positions, V]` and next tokens `[positions]`; positions labelled -100 or padded are left out."""
        inputs, labels, _ = split_batch(batch, input_device(model), labels_default="input_ids")
        if isinstance(inputs, Mapping) and "attention_mask" in inputs:
            labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
        logits = _logits(model, inputs)
        return _kept(logits[:, :-1], labels[:, 1:])


@dataclass(frozen=True)
class TokenTask:
    """One label per position, -100 where there is none: token classification, masked language models."""

    name: str = "token-classification"

    def decide(self, model: nn.Module, batch: Any) -> Decisions:
        """Logits `[labelled positions, C]` and their labels."""
        inputs, labels, _ = split_batch(batch, input_device(model))
        return _kept(_logits(model, inputs), labels)


def split_batch(
    batch: Any, device: torch.device, *, labels_default: str | None = None
) -> tuple[Tensor | dict[str, Tensor], Tensor, Tensor | None]:
    """Inputs, labels and sample numbers of a batch, on the device.

    Args:
        batch: a mapping with `labels` (and `index`, optional), or a sequence (inputs, labels[, index]).
        device: where they go.
        labels_default: key that stands in for absent labels.

    Raises:
        UsageError: the batch has neither form.
    """
    if isinstance(batch, Mapping):
        fields = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        index, labels = fields.pop("index", None), fields.pop("labels", None)
        if labels is None and labels_default is not None:
            labels = fields.get(labels_default)
        if labels is None:
            raise UsageError(f"batch with {', '.join(batch)}: no labels; name the label column `labels`")
        return fields, labels, index
    if isinstance(batch, Sequence) and len(batch) in (2, 3) and all(isinstance(part, Tensor) for part in batch):
        inputs, labels, *rest = (part.to(device, non_blocking=True) for part in batch)
        return inputs, labels, rest[0] if rest else None
    raise UsageError(f"batch of type {type(batch).__name__}: pass (inputs, labels[, index]) or a dict with `labels`")


def _logits(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    try:
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        # whatever a forward pass raises at inputs of another shape or kind, or for want of memory
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(f"{type(model).__name__}: out of memory ({reason(error)}); lower batch_size") from error
        raise ModelError(
            f"{type(model).__name__}: cannot read a batch ({reason(error)}); "
            "pass what it was made for, see data.image in a recipe"
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UsageError(f"{type(model).__name__}: its output has no logits; open it with the task it was trained for")
    return logits


def _kept(logits: Tensor, labels: Tensor) -> Decisions:
    if labels.shape != logits.shape[:2]:
        raise UsageError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: one label per position needed"
        )
    mask = labels != IGNORED
    return Decisions(logits[mask], labels[mask])
