# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for 28 to 32 pixels: Dosovitskiy et al. 2021 (arXiv 2010.11929), mean-pooled."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from calib.distill.networks.attention import ATTENTIONS, AttentionForm, EncoderLayer
from calib.distill.networks.registry import NETWORKS
from calib.errors import UsageError

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """Square patches, pre-norm encoder layers, the mean of all patches, a linear head.

    Args:
        width: of a patch's vector.
        depth: encoder layers.
        heads: attention heads.
        classes: outputs.
        channels: of the input.
        size: height and width of the input, a multiple of the patch.
        patch: height and width of a patch in pixels.
        attention: see `SelfAttention`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        channels: int,
        size: int,
        patch: int = 4,
        attention: AttentionForm = "softmax",
    ) -> None:
        super().__init__()
        if size % patch:
            raise UsageError(f"vit with {size} pixels: not a multiple of {patch}; resize the images")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, size, size]` to logits `[n, classes]`."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]


def _tiny(attention: AttentionForm, classes: int, channels: int, size: int) -> nn.Module:
    return VisionTransformer(128, 6, 4, classes, channels, size, attention=attention)


def _micro(attention: AttentionForm, classes: int, channels: int, size: int) -> nn.Module:
    # patches of 7 pixels where the images have 28, of 8 where they have 32: 16 of them
    return VisionTransformer(64, 4, 4, classes, channels, size, patch=size // 4, attention=attention)


for _form in ATTENTIONS:
    _suffix = "" if _form == "softmax" else f"_{_form}"
    NETWORKS[f"vit_tiny{_suffix}"] = partial(_tiny, _form)
    NETWORKS[f"vit_micro{_suffix}"] = partial(_micro, _form)
