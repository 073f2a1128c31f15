# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 for 32 x 32 pixels, half as wide: Sandler et al. 2018 (arXiv 1801.04381)."""

from __future__ import annotations

from torch import Tensor, nn

from calib.distill.networks.registry import network

__all__ = ["MobileNetV2"]

# expansion, channels, blocks, stride (table 2 of the paper; the first two strides are 1 for small images)
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.residual else out  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """Inverted residual blocks with linear bottlenecks.

    Args:
        width: factor of all channels but the last 1280.
        classes: outputs.
        channels: of the input.
    """

    def __init__(self, width: float, classes: int, channels: int) -> None:
        super().__init__()
        inputs = max(8, int(32 * width))
        self.stem = nn.Sequential(nn.Conv2d(channels, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6())
        stages: list[nn.Module] = []
        for expansion, outputs, blocks, stride in _STAGES:
            scaled = max(8, int(outputs * width))
            layers = []
            for number in range(blocks):
                layers.append(_InvertedResidual(inputs, scaled, stride if number == 0 else 1, expansion))
                inputs = scaled
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, h, w]` to logits `[n, classes]`."""
        return self.classifier(self.pool(self.last(self.stages(self.stem(x)))).flatten(1))  # type: ignore[no-any-return]


@network("mobilenetv2")
def _half(classes: int, channels: int, size: int) -> nn.Module:
    return MobileNetV2(0.5, classes, channels)
