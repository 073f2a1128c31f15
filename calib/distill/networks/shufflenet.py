# SPDX-License-Identifier: Apache-2.0
"""ShuffleNet for 32 x 32 pixels: V1 (Zhang et al. 2018, arXiv 1707.01083) and V2 (Ma et al. 2018, arXiv 1807.11164)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.distill.networks.registry import network

__all__ = ["ShuffleNet"]

_BLOCKS = (4, 8, 4)
_GROUPS = 3


def _convolution(
    inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def _shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class _BlockV1(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1; stride 2 concatenates the pooled input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        middle = outputs // 4
        # the first stage has too few channels for groups (section 3.2 of the paper)
        self.first = _convolution(inputs, middle, groups=1 if inputs == 24 else _GROUPS)
        self.depthwise = _convolution(middle, middle, 3, stride, middle, relu=False)
        self.second = _convolution(middle, added, groups=_GROUPS, relu=False)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.depthwise(_shuffled(self.first(x), _GROUPS)))
        if self.pool is None:
            return self.relu(out + x)  # type: ignore[no-any-return]
        return self.relu(torch.cat([out, self.pool(x)], 1))  # type: ignore[no-any-return]


class _BlockV2(nn.Module):
    """Channel split, 1 x 1, depthwise 3 x 3, 1 x 1, concatenation, shuffle."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left: nn.Module | None = None
        if stride == 2:
            self.left = nn.Sequential(
                _convolution(inputs, inputs, 3, 2, inputs, relu=False), _convolution(inputs, half)
            )
        start = inputs if stride == 2 else half
        self.right = nn.Sequential(
            _convolution(start, half), _convolution(half, half, 3, stride, half, relu=False), _convolution(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = (x, x) if self.left is not None else x.chunk(2, dim=1)
        left = kept if self.left is None else self.left(kept)
        return _shuffled(torch.cat([left, self.right(worked)], 1), 2)


class ShuffleNet(nn.Module):
    """24 channels, three stages of 4, 8 and 4 blocks, each halving the resolution, a linear head.

    Args:
        block: of version 1 or 2.
        widths: channels of the stages.
        last: channels of the convolution before the head; None for none (version 1).
        classes: outputs.
        channels: of the input.
    """

    def __init__(
        self, block: type[_BlockV1 | _BlockV2], widths: tuple[int, ...], last: int | None, classes: int, channels: int
    ) -> None:
        super().__init__()
        self.stem = _convolution(channels, 24)
        inputs, stages = 24, []
        for width, blocks in zip(widths, _BLOCKS, strict=True):
            layers = [block(inputs, width, 2)] + [block(width, width, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*layers))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.last: nn.Module = nn.Identity() if last is None else _convolution(inputs, last)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last or inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, channels, h, w]` to logits `[n, classes]`."""
        return self.classifier(self.pool(self.last(self.stages(self.stem(x)))).flatten(1))  # type: ignore[no-any-return]


@network("shufflenetv1")
def _v1(classes: int, channels: int, size: int) -> nn.Module:
    return ShuffleNet(_BlockV1, (240, 480, 960), None, classes, channels)


@network("shufflenetv2")
def _v2(classes: int, channels: int, size: int) -> nn.Module:
    return ShuffleNet(_BlockV2, (116, 232, 464), 1024, classes, channels)
