# SPDX-License-Identifier: Apache-2.0
"""HSAKD: hierarchical self-supervised augmented knowledge distillation; no library that is kept has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.features import View
from calib.distill.frameworks.framework import Framework, Weights, framework, soft_targets
from calib.errors import UsageError

__all__ = ["Hierarchical", "rotated"]

_ROTATIONS = 4


def rotated(batch: Any) -> Any:
    """Each image in its four rotations, one after the other; labels and numbers repeated.

    Args:
        batch: (images `[n, c, s, s]`, labels[, index]).

    Raises:
        UsageError: the batch does not hold square images.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) else None
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise UsageError("hsakd: rotates square images; use another framework for other inputs")
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(_ROTATIONS)], dim=1).flatten(0, 1)
    return (turned, *(part.repeat_interleave(_ROTATIONS) for part in batch[1:]))


def _auxiliary(channels: int, size: int, smallest: int, classes: int) -> nn.Sequential:
    """Convolutions with stride 2 down to the smallest map, one more, mean, linear layer over class x rotation."""
    layers: list[nn.Module] = []
    for _ in range(max(0, round(math.log2(size / smallest)))):
        layers += [nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU()]
        channels *= 2
    layers += [nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, _ROTATIONS * classes))


@framework("hsakd")
class Hierarchical(Framework):
    """Classifiers on every map tell class and rotation together; the student's match the teacher's, as the logits do.

    r CE on the image as it is + a T^2 KL of the logits over all rotations + b sum over maps of T^2 KL of the joint
    distributions; r = a = b = 1, T = 3. The teacher's classifiers are trained first, on the frozen teacher, so that any
    teacher plugs in unchanged. They are plain convolutions; the authors mirror the stages of each backbone.
    """

    summary = "class and rotation, told from every map"
    source = "Yang et al. 2021, IJCAI, doi 10.24963/ijcai.2021/168"
    defaults = Weights(1.0, 1.0, 1.0, temperature=3.0)
    needs_maps = True
    images_only = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        count, classes = min(len(student.maps), len(teacher.maps)), student.logits.shape[1]

        def classifiers(view: View) -> nn.ModuleList:
            smallest = view.maps[-1].shape[2]
            return nn.ModuleList(_auxiliary(m.shape[1], m.shape[2], smallest, classes) for m in view.maps[-count:])

        self.student_classifiers, self.teacher_classifiers = classifiers(student), classifiers(teacher)

    def prepare(self, batch: Any) -> Any:
        """Four rotations of each image."""
        return rotated(batch)

    def fit_teacher(self, view: Callable[[Any], View], loader: Any, epochs: int) -> None:
        """Trains the teacher's classifiers by cross entropy with class x rotation; the teacher stays frozen."""
        optimiser = torch.optim.SGD(
            self.teacher_classifiers.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
        self.teacher_classifiers.train()
        for _ in range(epochs):
            for batch in loader:
                seen = view(self.prepare(batch))
                joint = (
                    seen.labels * _ROTATIONS + torch.arange(len(seen.labels), device=seen.labels.device) % _ROTATIONS
                )
                outputs = self._joint(self.teacher_classifiers, seen)
                loss = torch.stack([nn.functional.cross_entropy(logits, joint) for logits in outputs]).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
        self.teacher_classifiers.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Hierarchical:
        """The teacher's classifiers never go back to training mode."""
        super().train(mode)
        self.teacher_classifiers.eval()
        return self

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """Sum over the maps of the divergence of the joint distributions."""
        mine = self._joint(self.student_classifiers, student)
        with torch.no_grad():
            theirs = self._joint(self.teacher_classifiers, teacher)
        pairs = zip(mine, theirs, strict=True)
        return torch.stack([soft_targets(s, t, self.weights.temperature) for s, t in pairs]).sum()

    def forward(self, student: View, teacher: View) -> Tensor:
        """The loss over a batch from `prepare`; the labels speak of the images as they are, so every fourth view."""
        weights = self.weights
        upright = nn.functional.cross_entropy(student.logits[::_ROTATIONS], student.labels[::_ROTATIONS])
        soft = soft_targets(student.logits, teacher.logits, weights.temperature)
        feature = self.feature_loss(student, teacher)
        return weights.cross_entropy * upright + weights.soft_targets * soft + self.feature_weight * feature

    @staticmethod
    def _joint(classifiers: nn.ModuleList, view: View) -> list[Tensor]:
        return [layer(m) for layer, m in zip(classifiers, view.maps[-len(classifiers) :], strict=True)]
