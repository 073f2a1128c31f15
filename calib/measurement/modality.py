# SPDX-License-Identifier: Apache-2.0
"""Keeps apart what the tokens of a row stand for: text, images, audio. Their values differ as sinks differ from others.

A processor puts one placeholder token for each image patch that reaches the text stack, and the configuration names it.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import nn

from calib.kernels import Accumulator, Kernel
from calib.kernels.plan import RowPlan
from calib.statistics import SiteStatistics

__all__ = ["ModalityAccumulator", "modality_tokens"]

_NAMES = {
    "image": ("image_token_id", "image_token_index", "im_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}


def modality_tokens(model: nn.Module) -> dict[str, int]:
    """Token ids that stand for an image, a video or audio, by modality; empty for a model of text alone."""
    config: Any = getattr(model, "config", None)
    found = {}
    for modality, names in _NAMES.items():
        token = next((t for name in names if isinstance(t := getattr(config, name, None), int)), None)
        if token is not None:
            found[modality] = token
    return found


class ModalityAccumulator:
    """One accumulator per modality; every value is read once.

    Args:
        kernel: makes the accumulators.
        channels: of the tensor.
    """

    def __init__(self, kernel: Kernel, channels: int) -> None:
        self._kernel, self._channels = kernel, channels
        self._held: dict[str, Accumulator] = {}

    def update(self, values: torch.Tensor, plan: RowPlan) -> None:
        """Takes in one batch; tensors that are not laid out by tokens have no modality."""
        for name, part in (plan.parts or {"": plan}).items():
            if name not in self._held:
                self._held[name] = self._kernel.accumulator(self._channels)
            self._held[name].update(values, part)

    def result(self) -> SiteStatistics:
        """Of all modalities together."""
        if not self._held:
            return self._kernel.accumulator(self._channels).result()
        return reduce(SiteStatistics.merge, (self._held[name].result() for name in sorted(self._held)))

    def parts(self) -> dict[str, SiteStatistics]:
        """Of each modality."""
        return {name: self._held[name].result() for name in sorted(self._held) if name}
