# SPDX-License-Identifier: Apache-2.0
"""ReviewKD: the context loss of torchdistill; the fusion is ours, for torchdistill's needs torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.distill.features import View
from calib.distill.frameworks.framework import Framework, Weights, framework
from calib.distill.frameworks.torchdistill_losses import torchdistill_losses

__all__ = ["Fusion", "Review"]

_MAX_WIDTH = 512


class Fusion(nn.Module):
    """Attention-based fusion.

    The student's map x goes through a 1 x 1 convolution; the deeper result y, enlarged to it, is added with one
    attention map each: z = a_x x + a_y y, (a_x, a_y) = sigmoid(1 x 1 convolution of both). z goes on to the next
    fusion, and through a 3 x 3 convolution it is compared with the teacher's map.

    Args:
        inputs: channels of the student's map.
        middle: channels of z.
        outputs: channels of the teacher's map.
        fuse: False for the deepest map, which has nothing deeper.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, *, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(nn.Conv2d(middle, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Returns what is compared, at the teacher's `size`, and what goes on."""
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = nn.functional.interpolate(deeper, size=x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, deeper], dim=1))
            x = x * weights[:, :1] + deeper * weights[:, 1:]
        compared = x if x.shape[2:] == size else nn.functional.interpolate(x, size=size, mode="nearest")
        return self.expand(compared), x


@framework("reviewkd")
class Review(Framework):
    """Deeper student maps, fused with shallower ones, learn the teacher's shallower maps; compared at 4 scales."""

    summary = "maps of several depths, fused, at several scales"
    source = "Chen et al. 2021, arXiv 2104.09044"
    defaults = Weights(1.0, 0.0, 1.0)
    needs_maps = True
    images_only = True
    warmup = 20 / 240  # 20 of 240 epochs in the authors' code

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        count = min(len(student.maps), len(teacher.maps))
        middle = min(_MAX_WIDTH, student.maps[-1].shape[1])
        pairs = zip(student.maps[-count:], teacher.maps[-count:], strict=True)
        self.fusions = nn.ModuleList(
            Fusion(mine.shape[1], middle, theirs.shape[1], fuse=number < count - 1)
            for number, (mine, theirs) in enumerate(pairs)
        )
        self.loss = torchdistill_losses("reviewkd").HierarchicalContextLoss("m", "output", "m", "output")

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """Sum over the maps, from the deepest to the shallowest."""
        count = len(self.fusions)
        total, deeper = student.logits.new_zeros(()), None
        triples = list(zip(self.fusions, student.maps[-count:], teacher.maps[-count:], strict=True))
        for fusion, mine, theirs in reversed(triples):
            compared, deeper = fusion(mine, deeper, theirs.shape[2:])
            total = total + self.loss({"m": {"output": (compared, deeper)}}, {"m": {"output": theirs}})
        return total
