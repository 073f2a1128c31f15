# SPDX-License-Identifier: Apache-2.0
"""Frameworks on logits: no teacher at all, KD, DKD."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.distill.features import View
from calib.distill.frameworks.framework import Framework, Weights, framework

__all__ = ["CrossEntropy", "DecoupledDistillation", "KnowledgeDistillation", "decoupled_loss"]


@framework("ce")
class CrossEntropy(Framework):
    """The control without a teacher."""

    summary = "no teacher: cross entropy with the labels (control)"
    defaults = Weights(1.0, 0.0, 0.0)


@framework("kd")
class KnowledgeDistillation(Framework):
    """Soft targets: 0.1 CE + 0.9 T^2 KL, T = 4, as in the CRD benchmark and the MCMI paper's code."""

    summary = "soft targets"
    source = "Hinton et al. 2015, arXiv 1503.02531"
    defaults = Weights(0.1, 0.9, 0.0)


@framework("dkd")
class DecoupledDistillation(Framework):
    """Soft targets in two parts, target class against rest and the rest among themselves: CE + TCKD + 8 NCKD."""

    summary = "target class and other classes apart"
    source = "Zhao et al. 2022, arXiv 2203.08679, eq. 7"
    defaults = Weights(1.0, 0.0, 1.0)
    warmup = 20 / 240  # 20 of 240 epochs in the authors' code
    alpha, beta = 1.0, 8.0

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """Eq. 7 of the paper."""
        return decoupled_loss(
            student.logits, teacher.logits, student.labels, self.alpha, self.beta, self.weights.temperature
        )


def decoupled_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), mean over samples (eq. 7).

    TCKD = KL(b_teacher ‖ b_student) of the pairs (p_target, 1 - p_target); NCKD = KL of the softmax over the other
    classes. KD is TCKD + (1 - p_target of the teacher) NCKD (eq. 6): with beta = 1 the others count in full.

    Args:
        student: logits `[n, C]`, C >= 3; with 2 classes NCKD is 0.
        teacher: logits `[n, C]`.
        labels: int64 `[n]`.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T.
    """
    target = torch.nn.functional.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of (p_target, 1 - p_target) `[n, 2]` and of the softmax over the others `[n, C - 1]`."""
        scaled = logits.float() / temperature
        others = scaled[~target].view(len(scaled), -1)
        sums = torch.stack([scaled[target], others.logsumexp(dim=1)], dim=1)
        return torch.log_softmax(sums, dim=1), torch.log_softmax(others, dim=1)

    (student_pair, student_others), (teacher_pair, teacher_others) = parts(student), parts(teacher)

    def divergence(theirs: Tensor, mine: Tensor) -> Tensor:
        return (theirs.exp() * (theirs - mine)).sum(dim=1).mean()

    tckd, nckd = divergence(teacher_pair, student_pair), divergence(teacher_others, student_others)
    return temperature**2 * (alpha * tckd + beta * nckd)
