# SPDX-License-Identifier: Apache-2.0
"""VGG with batch normalisation for 32 x 32 pixels: Simonyan & Zisserman 2015 (arXiv 1409.1556), one linear head."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from calib.distill.networks.registry import NETWORKS

__all__ = ["VGG"]

_WIDTHS = (64, 128, 256, 512, 512)
# convolutions of each stage; 8 is the size that distillation papers added
_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3 x 3 convolutions; the second, third and fourth begin with a pooling: 32 pixels become 4.

    Args:
        depth: 8, 11, 13, 16 or 19.
        classes: outputs.
        channels: of the input.
    """

    def __init__(self, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for number, (width, convolutions) in enumerate(zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if 0 < number < 4 else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            stages.append(nn.Sequential(*layers))
        self.features = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, h, w]`, 8 pixels or more a side, to logits `[n, classes]`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))  # type: ignore[no-any-return]


def _make(depth: int, classes: int, channels: int, size: int) -> nn.Module:
    return VGG(depth, classes, channels)


for _depth in _CONVOLUTIONS:
    NETWORKS[f"vgg{_depth}"] = partial(_make, _depth)
