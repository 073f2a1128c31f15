# SPDX-License-Identifier: Apache-2.0
"""Conditional mutual information of a classifier, and what belongs to it, from sums that merge by addition."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calib.errors import ModelError, UsageError

__all__ = ["ClassInformation", "InformationSummary", "NonFiniteLogits"]

ECE_BINS = 15
_CHUNK_ELEMENTS = 1 << 24  # 128 MB of float64 at a time: a language model has 50 k outputs per token


class NonFiniteLogits(ModelError):  # noqa: N818 - names what was found
    """A model answered with NaN or infinity."""


@dataclass(frozen=True)
class InformationSummary:
    """What `ClassInformation` knows after the last batch. All information in nats.

    `cmi` is exact where each class has a row of its own; where classes share rows (`grouped`) it is an upper bound,
    because E D(P‖Q') = CMI + E D(Q‖Q') for any rows Q'.
    """

    samples: int
    classes: int
    absent_classes: int
    temperature: float
    grouped: bool
    cmi: float
    separation: float | None
    ncmi: float | None
    log_likelihood: float
    accuracy: float
    ece: float
    output_entropy_given_class: float

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """Plain values, for JSON."""
        return asdict(self)


class ClassInformation:
    """CMI, class centroids, separation, NCMI, log-likelihood, accuracy and ECE of a classifier, streaming and exact.

    With P_x = softmax(logits / T), n_y samples of class y and N in all (arXiv 2401.08732, eq. 2; 2309.09123):

    * Q^y = (1/n_y) sum_{x in y} P_x, the class centroid;
    * CMI = (1/N) sum_x D(P_x ‖ Q^{y(x)}) = (1/N) sum_y [ sum_{x in y} sum_i P_x ln P_x - n_y sum_i Q^y ln Q^y ], which
      needs one pass, because both terms are functions of sums;
    * separation Γ = E[ 1{Y != V} H(P_X, P_U) ] over two independent draws, diagonal pairs included, H the cross
      entropy: -(1/N^2) sum_{y != v} (sum_{x in y} P_x) . (sum_{u in v} ln P_u);
    * NCMI = CMI / Γ.

    Law: the state is counts and float64 sums over samples, so two states of disjoint samples merge by addition; the
    order changes results by rounding only. Memory: rows x outputs float64, twice with `separation`.

    Args:
        classes: number of outputs of the classifier, C.
        rows: number of centroid rows; C unless labels are grouped.
        row_of_label: int64 `[C]`, the row of each label, or None for one row per label.
        temperature: T of the softmax.
        separation: also keep what Γ needs.
        device: where the sums live; the batches may live elsewhere.
    """

    def __init__(
        self,
        classes: int,
        *,
        rows: int | None = None,
        row_of_label: Tensor | None = None,
        temperature: float = 1.0,
        separation: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if classes < 2:
            raise UsageError(f"classifier with {classes} output: CMI needs 2 or more classes; regression has none")
        if not (math.isfinite(temperature) and temperature > 0):
            raise UsageError(f"temperature {temperature}: not a positive number; pass e.g. 1 or 4")
        self.classes = classes
        self.rows = classes if rows is None else rows
        self.row_of_label = None if row_of_label is None else row_of_label.to(device)
        self.temperature = temperature

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.counts = zeros(self.rows)
        self.sums = zeros(self.rows, classes)
        self.log_sums = zeros(self.rows, classes) if separation else None
        self.negative_entropy = zeros(1)
        self.log_likelihood = zeros(1)
        self.correct = zeros(1)
        self.bins = zeros(3, ECE_BINS)  # samples, confidence, correct

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds samples.

        Args:
            logits: `[n, C]`, any floating dtype.
            labels: int64 `[n]`, 0 <= label < C.

        Raises:
            UsageError: a label or the number of outputs does not fit.
            NonFiniteLogits: a logit is NaN or infinite.
        """
        if logits.dim() != 2 or logits.shape[1] != self.classes or labels.shape != logits.shape[:1]:
            raise UsageError(
                f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)}: "
                f"expected [n, {self.classes}] and [n]; check the task"
            )
        rows = max(1, _CHUNK_ELEMENTS // self.classes)
        for part, target in zip(logits.split(rows), labels.split(rows), strict=True):
            self._update(part.to(self.sums.device, torch.float64), target.to(self.sums.device))

    def _update(self, logits: Tensor, labels: Tensor) -> None:
        if not len(labels):
            return
        if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise UsageError(
                f"labels {int(labels.min())}..{int(labels.max())}: the model has {self.classes} classes; "
                "pass the data set it was trained for, -100 is for language models"
            )
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteLogits("logits: NaN or infinite; check the model, its dtype and its inputs")
        log_p = torch.log_softmax(logits / self.temperature, dim=1)
        p = log_p.exp()
        groups = labels if self.row_of_label is None else self.row_of_label[labels]
        self.counts.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.sums.index_add_(0, groups, p)
        if self.log_sums is not None:
            self.log_sums.index_add_(0, groups, log_p)
        self.negative_entropy += (p * log_p).sum()
        self.log_likelihood += log_p.gather(1, labels[:, None]).sum()
        confidence, predicted = p.max(dim=1)
        hit = (predicted == labels).double()
        self.correct += hit.sum()
        # bin b holds confidences in (b/15, (b+1)/15] (Guo et al. 2017, eq. 3)
        index = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
        for number, values in enumerate((torch.ones_like(hit), confidence, hit)):
            self.bins[number].index_add_(0, index, values)

    @property
    def samples(self) -> int:
        """Number of samples seen."""
        return int(self.counts.sum())

    def merge(self, other: ClassInformation) -> None:
        """Adds the samples that `other` has seen."""
        if (self.rows, self.classes, self.temperature) != (other.rows, other.classes, other.temperature):
            raise UsageError(
                f"information of {other.rows} x {other.classes} at T={other.temperature} does not fit "
                f"{self.rows} x {self.classes} at T={self.temperature}; measure both alike"
            )
        for mine, theirs in zip(self._state(), other._state(), strict=True):
            mine.add_(theirs.to(mine.device))

    def all_reduce(self) -> None:
        """Adds up the sums of all ranks, where `torch.distributed` is initialised; otherwise does nothing."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in self._state():
                torch.distributed.all_reduce(tensor)

    def _state(self) -> list[Tensor]:
        state = [self.counts, self.sums, self.negative_entropy, self.log_likelihood, self.correct, self.bins]
        return state if self.log_sums is None else [*state, self.log_sums]

    def centroids(self) -> Tensor:
        """Q, float64 `[rows, C]`: the mean output of each class; uniform for a class without samples."""
        mean = self.sums / self.counts.clamp(min=1)[:, None]
        mean[self.counts == 0] = 1 / self.classes
        return mean

    def divergence_from(self, rows: Tensor) -> float:
        """E D(P_X ‖ rows[Y]) in nats for any rows `[rows, C]` that are positive where the outputs are."""
        cross = torch.special.xlogy(self.sums, rows.to(self.sums)).sum()
        return float(self.negative_entropy - cross) / max(self.samples, 1)

    def centroid_divergence_from(self, rows: Tensor) -> float:
        """E_Y D(Q^Y ‖ rows[Y]) in nats."""
        q = self.centroids()
        per_row = (torch.special.xlogy(q, q) - torch.special.xlogy(q, rows.to(q))).sum(dim=1)
        return float(self.counts @ per_row) / max(self.samples, 1)

    def summary(self) -> InformationSummary:
        """The numbers.

        Raises:
            UsageError: no sample was seen.
        """
        count = self.samples
        if not count:
            raise UsageError("data: no labelled sample; check the labels and the selection")
        q = self.centroids()
        row_entropy = -torch.special.xlogy(q, q).sum(dim=1)
        entropy = float(self.counts @ row_entropy) / count
        cmi = max(entropy + float(self.negative_entropy) / count, 0.0)  # rounding may leave -1e-17
        separation = self._separation(count)
        size, confidence, hit = self.bins
        return InformationSummary(
            samples=count,
            classes=self.classes,
            absent_classes=int((self.counts == 0).sum()),
            temperature=self.temperature,
            grouped=self.row_of_label is not None,
            cmi=cmi,
            separation=separation,
            ncmi=cmi / separation if separation else None,
            log_likelihood=float(self.log_likelihood) / count,
            accuracy=float(self.correct) / count,
            ece=float((confidence - hit).abs().sum() / size.sum()),
            output_entropy_given_class=entropy,
        )

    def _separation(self, count: int) -> float | None:
        if self.log_sums is None:
            return None
        everything = self.sums.sum(dim=0) @ self.log_sums.sum(dim=0)
        return float((self.sums * self.log_sums).sum() - everything) / count**2
