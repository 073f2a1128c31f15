# SPDX-License-Identifier: Apache-2.0
"""Residual networks for 32 x 32 pixels: He et al. 2016 (arXiv 1512.03385, section 4.2), and four times as wide."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from calib.distill.networks.registry import NETWORKS

__all__ = ["ResNet"]

_DEPTHS = (8, 14, 20, 32, 44, 56, 110)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (1 x 1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Depth 6n + 2: a convolution, three stages of n blocks at full, half and quarter resolution, a linear head.

    Args:
        depth: 6n + 2.
        widths: channels of the first convolution and of the three stages.
        classes: outputs.
        channels: of the input.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages = [
            nn.Sequential(*(_Block(a if k == 0 else b, b, stride if k == 0 else 1) for k in range(blocks)))
            for a, b, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True)
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, h, w]` to logits `[n, classes]`."""
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def _make(depth: int, widths: tuple[int, int, int, int], classes: int, channels: int, size: int) -> nn.Module:
    return ResNet(depth, widths, classes, channels)


for _depth in _DEPTHS:
    NETWORKS[f"resnet{_depth}"] = partial(_make, _depth, (16, 16, 32, 64))
    if _depth in (8, 32):
        NETWORKS[f"resnet{_depth}x4"] = partial(_make, _depth, (32, 64, 128, 256))
