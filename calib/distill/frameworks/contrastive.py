# SPDX-License-Identifier: Apache-2.0
"""CRD, with the loss of torchdistill."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.distill.features import View
from calib.distill.frameworks.framework import Framework, Weights, framework
from calib.distill.frameworks.torchdistill_losses import torchdistill_losses
from calib.errors import UsageError

__all__ = ["Contrastive"]

_WIDTH = 128
_NEGATIVES = 16384
_TEMPERATURE = 0.07
_MOMENTUM = 0.5


@framework("crd")
class Contrastive(Framework):
    """Tells the pair (student, teacher) of one image from pairs of different images, drawn from a memory.

    Negatives are drawn here, uniformly over the student's own data set: torchdistill 1.1.5 cannot draw (its `draw` uses
    names that it never sets), and the MCMI paper's few-shot code drew from samples that the student never sees.
    """

    summary = "contrast between pairs of one image and of different images"
    source = "Tian et al. 2020, arXiv 1910.10699"
    defaults = Weights(1.0, 0.0, 0.8)
    needs_embedding = True

    def build(self, student: View, teacher: View) -> None:
        """Layers and loss."""
        assert student.embedding is not None
        assert teacher.embedding is not None
        if student.index is None:
            raise UsageError("crd: needs the number of each sample; batches must be (inputs, labels, index)")
        self.negatives = min(_NEGATIVES, self.samples)
        self.student_layer = nn.Linear(student.embedding.shape[1], _WIDTH)
        self.teacher_layer = nn.Linear(teacher.embedding.shape[1], _WIDTH)
        self.loss = torchdistill_losses("crd").CRDLoss(
            "s", "empty", "t", _WIDTH, self.samples, self.negatives, self.samples, _TEMPERATURE, _MOMENTUM
        )

    def feature_loss(self, student: View, teacher: View) -> Tensor:
        """On the embeddings, through a linear layer each and normalised."""
        assert student.index is not None
        mine = nn.functional.normalize(self.student_layer(student.embedding), dim=1)
        theirs = nn.functional.normalize(self.teacher_layer(teacher.embedding), dim=1)
        drawn = torch.randint(self.samples, (len(mine), self.negatives + 1), device=mine.device)
        drawn[:, 0] = student.index
        loss = self.loss(
            {"s": {"output": mine}, "empty": {"input": {"pos_idx": student.index, "contrast_idx": drawn}}},
            {"t": {"output": theirs}},
        )
        # the first call stores its normalisation constants together with their graph
        self.loss.params.detach_()
        return loss.sum()  # type: ignore[no-any-return]
