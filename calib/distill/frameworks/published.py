# SPDX-License-Identifier: Apache-2.0
"""AT, PKT, SP, CC, RKD and VID, with the losses of torchdistill.

Weights are those of the CRD benchmark (Tian et al. 2020, arXiv 1910.10699), which the MCMI paper's code follows: no
soft targets, r = 1. Where torchdistill departs from the published formula, the class says so and follows the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.features import View
from calib.distill.frameworks.framework import Framework, Weights, framework, paired_maps
from calib.distill.frameworks.torchdistill_losses import torchdistill_losses

__all__ = ["Attention", "CorrelationCongruence", "ProbabilisticTransfer", "Relational", "Similarity", "Variational"]


def _outputs(**tensors: Any) -> dict[str, dict[str, Any]]:
    """The dictionary that torchdistill reads: module name -> {input | output: tensor}."""
    return {name: {"output": tensor, "input": tensor} for name, tensor in tensors.items()}


@framework("at")
class Attention(Framework):
    """Spatial attention, the normalised sum of squares over channels, of each pair of maps."""

    summary = "spatial attention maps"
    source = "Zagoruyko & Komodakis 2017, arXiv 1612.03928, eq. 2; mean of squares as in the authors' code"
    defaults = Weights(1.0, 0.0, 1000.0)
    needs_maps = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        point = {"io": "output"}
        count = min(len(student.maps), len(teacher.maps))
        pairs = {
            str(n): {"teacher": point | {"path": str(n)}, "student": point | {"path": str(n)}} for n in range(count)
        }
        self.loss = torchdistill_losses("at").ATLoss(pairs, mode="code")

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """Sum over the pairs."""
        pairs = paired_maps(student, teacher)
        mine, theirs = (_outputs(**{str(n): pair[side] for n, pair in enumerate(pairs)}) for side in (0, 1))
        return self.loss(mine, theirs)  # type: ignore[no-any-return]


@framework("pkt")
class ProbabilisticTransfer(Framework):
    """KL between the cosine similarities of a batch, read as probabilities."""

    summary = "similarities within a batch as probabilities"
    source = "Passalis & Tefas 2018, arXiv 1803.10837"
    defaults = Weights(1.0, 0.0, 30000.0)
    needs_embedding = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        self.loss = torchdistill_losses("pkt").PKTLoss("e", "output", "e", "output")

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """On the embeddings."""
        return self.loss(_outputs(e=student.embedding), _outputs(e=teacher.embedding))  # type: ignore[no-any-return]


@framework("sp")
class Similarity(Framework):
    """Frobenius distance of the row-normalised Gram matrices of a batch, over n^2.

    torchdistill 1.1.5 divides rows by their L1 norm; the paper, and here, by their L2 norm.
    """

    summary = "similarities within a batch"
    source = "Tung & Mori 2019, arXiv 1907.09682, eq. 4"
    defaults = Weights(1.0, 0.0, 3000.0)
    needs_embedding = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        self.loss = torchdistill_losses("sp").SPKDLoss("e", "e", "batchmean")
        self.loss.matmul_and_normalize = _row_normalised_gram

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """On the last maps, or on the embeddings where there are none."""
        images = bool(student.maps and teacher.maps) and student.maps[-1].shape[3] > 1
        mine, theirs = (v.maps[-1] if images else v.embedding for v in (student, teacher))
        return self.loss(_outputs(e=mine), _outputs(e=theirs))  # type: ignore[no-any-return]


def _row_normalised_gram(z: Tensor) -> Tensor:
    flat = z.flatten(1)
    return nn.functional.normalize(flat @ flat.T, p=2.0, dim=1)


@framework("cc")
class CorrelationCongruence(Framework):
    """Mean squared difference of the correlations within a batch: Gaussian kernel, Taylor series of order 2, gamma 0.4.

    Embeddings go through a linear layer each into 128 dimensions and are normalised, which the series needs.
    torchdistill 1.1.5 gives the kernel; its loss takes the distance without the square, so that is not used. The weight
    is the CRD benchmark's, which computes another CC: tune it.
    """

    summary = "correlations within a batch"
    source = "Peng et al. 2019, arXiv 1904.01802"
    defaults = Weights(1.0, 0.0, 0.02)
    needs_embedding = True
    width = 128

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        assert student.embedding is not None
        assert teacher.embedding is not None
        self.student_layer = nn.Linear(student.embedding.shape[1], self.width)
        self.teacher_layer = nn.Linear(teacher.embedding.shape[1], self.width)
        kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
        self.loss = torchdistill_losses("cc").CCKDLoss("e", "e", kernel, "batchmean")

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """On the embeddings."""
        mine = nn.functional.normalize(self.student_layer(student.embedding), dim=1)
        theirs = nn.functional.normalize(self.teacher_layer(teacher.embedding), dim=1)
        matrix = self.loss.compute_cc_mat_by_gaussian_rbf
        return nn.functional.mse_loss(matrix(mine), matrix(theirs))


@framework("rkd")
class Relational(Framework):
    """Huber loss on distances between two samples and on angles between three; 25 and 50, as in the paper."""

    summary = "distances and angles within a batch"
    source = "Park et al. 2019, arXiv 1904.05068"
    defaults = Weights(1.0, 0.0, 1.0)
    needs_embedding = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        self.loss = torchdistill_losses("rkd").RKDLoss("e", "e", 25.0, 50.0, "mean")

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """On the embeddings."""
        return self.loss(_outputs(e=student.embedding), _outputs(e=teacher.embedding))  # type: ignore[no-any-return]


class _Regressor(nn.Module):
    """Mean by three 1 x 1 convolutions, variance one number per channel: ln(1 + e^rho) + 1e-5, 5 at first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 1, bias=False),
        )
        self.rho = nn.Parameter(torch.full((1, outputs, 1, 1), 5.0).expm1().log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        return mean, (nn.functional.softplus(self.rho) + 1e-5).expand_as(mean)


@framework("vid")
class Variational(Framework):
    """Gaussian log-likelihood of the teacher's maps given the student's."""

    summary = "variational bound on the information between maps"
    source = "Ahn et al. 2019, arXiv 1904.05835"
    defaults = Weights(1.0, 0.0, 1.0)
    needs_maps = True
    images_only = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        pairs = paired_maps(student, teacher)
        self.regressors = nn.ModuleList(_Regressor(mine.shape[1], theirs.shape[1]) for mine, theirs in pairs)
        point = {"io": "output"}
        names = {
            str(n): {"teacher": point | {"path": str(n)}, "student": point | {"path": str(n)}}
            for n in range(len(pairs))
        }
        self.loss = torchdistill_losses("vid").VIDLoss(names)

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """Sum over the pairs of the mean over elements."""
        pairs = paired_maps(student, teacher)
        predicted = {str(n): layer(pair[0]) for n, (layer, pair) in enumerate(zip(self.regressors, pairs, strict=True))}
        theirs = {str(n): pair[1] for n, pair in enumerate(pairs)}
        return self.loss(_outputs(**predicted), _outputs(**theirs))  # type: ignore[no-any-return]
