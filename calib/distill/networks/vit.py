# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for 28 to 32 pixels: Dosovitskiy et al. 2021 (arXiv 2010.11929), mean-pooled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.distill.networks.registry import network
from calib.errors import UsageError

__all__ = ["VisionTransformer"]

_PATCH = 4


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels, pre-norm encoder layers, the mean of all patches, a linear head.

    Args:
        width: of a patch's vector.
        depth: encoder layers.
        heads: attention heads.
        classes: outputs.
        channels: of the input.
        size: height and width of the input, a multiple of 4.
    """

    def __init__(self, width: int, depth: int, heads: int, classes: int, channels: int, size: int) -> None:
        super().__init__()
        if size % _PATCH:
            raise UsageError(f"vit with {size} pixels: not a multiple of {_PATCH}; resize the images")
        self.patches = nn.Conv2d(channels, width, _PATCH, _PATCH)
        self.positions = nn.Parameter(torch.randn(1, (size // _PATCH) ** 2, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, size, size]` to logits `[n, classes]`."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]


@network("vit_tiny")
def _tiny(classes: int, channels: int, size: int) -> nn.Module:
    return VisionTransformer(128, 6, 4, classes, channels, size)
