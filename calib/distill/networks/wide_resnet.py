# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks: Zagoruyko & Komodakis 2016 (arXiv 1605.07146)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from calib.distill.networks.registry import NETWORKS

__all__ = ["WideResNet"]


class _Block(nn.Module):
    """Normalisation and ReLU before each of two 3 x 3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(self.relu(self.bn2(self.conv1(out))))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """Depth 6n + 4, k times as wide.

    Args:
        depth: 6n + 4.
        widening: k.
        classes: outputs.
        channels: of the input.
    """

    def __init__(self, depth: int, widening: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16, 16 * widening, 32 * widening, 64 * widening)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        stages = [
            nn.Sequential(*(_Block(a if k == 0 else b, b, stride if k == 0 else 1) for k in range(blocks)))
            for a, b, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True)
        ]
        self.block1, self.block2, self.block3 = stages
        self.bn = nn.BatchNorm2d(widths[-1])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, h, w]` to logits `[n, classes]`."""
        x = self.relu(self.bn(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def _make(depth: int, widening: int, classes: int, channels: int, size: int) -> nn.Module:
    return WideResNet(depth, widening, classes, channels)


for _depth, _widening in ((16, 1), (16, 2), (40, 1), (40, 2)):
    NETWORKS[f"wrn_{_depth}_{_widening}"] = partial(_make, _depth, _widening)
