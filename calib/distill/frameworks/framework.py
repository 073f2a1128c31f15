# SPDX-License-Identifier: Apache-2.0
"""The interface of a framework: r CE + a T^2 KL(teacher ‖ student) + b feature loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.distill.features import View
from calib.errors import UsageError

__all__ = ["FRAMEWORKS", "Framework", "Weights", "framework", "make_framework", "paired_maps", "soft_targets"]


@dataclass(frozen=True)
class Weights:
    """r, a and b of the loss, and the temperature T of the soft targets."""

    cross_entropy: float
    soft_targets: float
    feature: float
    temperature: float = 4.0


class Framework(nn.Module):
    """Loss of a student; its parameters, if it has any, are trained with the student's and thrown away.

    Subclasses give `feature_loss`, make in `build` what it needs, and say by `needs_maps`, `needs_embedding` and
    `images_only` what that is.

    Args:
        student: one view of the student, for shapes.
        teacher: one view of the teacher.
        samples: size of the student's data set.
        weights: r, a, b and T.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    defaults: ClassVar[Weights] = Weights(1.0, 0.0, 1.0)
    needs_maps: ClassVar[bool] = False
    needs_embedding: ClassVar[bool] = False
    images_only: ClassVar[bool] = False
    warmup: ClassVar[float] = 0.0
    """Share of the training over which b grows from 0."""

    def __init__(self, student: View, teacher: View, samples: int, weights: Weights | None = None) -> None:
        super().__init__()
        self.weights = weights or self.defaults
        self.samples = samples
        self.progress = 1.0
        name = f"framework {self.name}"
        if student.logits.shape[1] != teacher.logits.shape[1]:
            raise UsageError(
                f"{name}: the teacher has {teacher.logits.shape[1]} classes, the student {student.logits.shape[1]}; "
                "make them equal"
            )
        if self.needs_embedding and (student.embedding is None or teacher.embedding is None):
            raise UsageError(f"{name}: needs embeddings, but no linear head was found; use kd or dkd")
        if self.needs_maps and not (student.maps and teacher.maps):
            raise UsageError(f"{name}: needs feature maps, but none were found; use kd or dkd")
        if self.images_only and (student.maps[-1].shape[3] == 1 or teacher.maps[-1].shape[3] == 1):
            raise UsageError(f"{name}: is defined on images; use kd, dkd, pkt, sp, cc or rkd")
        self.build(student, teacher)

    def build(self, student: View, teacher: View) -> None:
        """Makes layers and losses for views of these shapes; none, unless a framework says otherwise."""

    def prepare(self, batch: Any) -> Any:
        """The batch that student and teacher see; as it is, unless a framework says otherwise."""
        return batch

    def fit_teacher(self, view: Callable[[Any], View], loader: Any, epochs: int) -> None:
        """Trains what the framework adds to the teacher; nothing, unless it says otherwise."""

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """The term that has the weight b, a scalar."""
        raise NotImplementedError

    def forward(self, student: View, teacher: View) -> Tensor:
        """The loss, a scalar.

        Args:
            student: with gradients.
            teacher: without.
        """
        weights = self.weights
        loss = student.logits.new_zeros(())
        if weights.cross_entropy:
            loss = loss + weights.cross_entropy * nn.functional.cross_entropy(student.logits, student.labels)
        if weights.soft_targets:
            loss = loss + weights.soft_targets * soft_targets(student.logits, teacher.logits, weights.temperature)
        if weights.feature:
            loss = loss + self.feature_weight * self.feature_loss(student, teacher)
        return loss

    @property
    def feature_weight(self) -> float:
        """The weight b now; `progress` is the share of the training that is done."""
        return self.weights.feature * min(1.0, self.progress / self.warmup) if self.warmup else self.weights.feature


FRAMEWORKS: dict[str, type[Framework]] = {}
"""Name -> class."""


def framework(name: str) -> Callable[[type[Framework]], type[Framework]]:
    """Registers a framework under a name."""

    def register(cls: type[Framework]) -> type[Framework]:
        FRAMEWORKS[name] = cls
        cls.name = name
        return cls

    return register


def make_framework(name: str, student: View, teacher: View, samples: int, **weights: float | None) -> Framework:
    """A framework by name.

    Args:
        name: one of `FRAMEWORKS`.
        student: one view of the student, for shapes.
        teacher: one view of the teacher.
        samples: size of the student's data set.
        weights: fields of `Weights` that differ from the framework's own; None keeps those.

    Raises:
        UsageError: an unknown name, or models without what the framework needs.
    """
    if name not in FRAMEWORKS:
        raise UsageError(f"framework {name!r}: unknown; choose one of {', '.join(FRAMEWORKS)}")
    cls = FRAMEWORKS[name]
    given = {key: value for key, value in weights.items() if value is not None}
    return cls(student, teacher, samples, replace(cls.defaults, **given))


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 D(softmax(teacher / T) ‖ softmax(student / T)), mean over samples (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: logits `[n, C]`.
        teacher: logits `[n, C]`.
        temperature: T.
    """
    student_log, teacher_log = (torch.log_softmax(z.float() / temperature, dim=1) for z in (student, teacher))
    return nn.functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def paired_maps(student: View, teacher: View) -> list[tuple[Tensor, Tensor]]:
    """The last maps of both, as many as both have, averaged down to the smaller of their resolutions."""
    count = min(len(student.maps), len(teacher.maps))
    pairs = []
    for mine, theirs in zip(student.maps[-count:], teacher.maps[-count:], strict=True):
        size = (min(mine.shape[2], theirs.shape[2]), min(mine.shape[3], theirs.shape[3]))
        left, right = (m if m.shape[2:] == size else nn.functional.adaptive_avg_pool2d(m, size) for m in (mine, theirs))
        pairs.append((left, right))
    return pairs
