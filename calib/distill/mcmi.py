# SPDX-License-Identifier: Apache-2.0
"""The MCMI objective on one batch: maximise log-likelihood plus lambda times CMI."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.errors import UsageError

__all__ = ["ROW_FLOOR", "McmiTerms", "check_strength", "floored", "mcmi_loss"]

ROW_FLOOR = 1e-8
"""Smallest entry of a centroid inside the logarithm: bounds D(P‖Q) by 18.4 nats and its gradient with it."""


@dataclass(frozen=True)
class McmiTerms:
    """Scalars in nats: `loss` is what an optimiser minimises, `cross_entropy - strength * divergence`."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def check_strength(strength: float) -> float:
    """The strength lambda, if it is one.

    Raises:
        UsageError: negative (that would minimise CMI) or 1 and more (the objective then has no maximum worth having).
    """
    if not 0 <= strength < 1:
        raise UsageError(
            f"strength {strength}: lambda is 0 or more and below 1 and always maximises CMI; try 0.05 to 0.5"
        )
    return strength


def floored(rows: Tensor, floor: float = ROW_FLOOR) -> Tensor:
    """Centroid rows in float32 that are safe inside a logarithm."""
    return rows.float().clamp(min=floor)


def mcmi_loss(
    logits: Tensor, labels: Tensor, rows: Tensor, strength: float, *, row_of_label: Tensor | None = None
) -> McmiTerms:
    """CE - lambda mean_x D(P_x ‖ Q^y), to be minimised: the MCMI objective (arXiv 2401.08732, eq. 14 of its reviews).

    The rows are constants. By the envelope theorem that gives the exact gradient of LL + lambda CMI where the rows are
    the class means of the current model; with stale rows it is the gradient of an upper bound of CMI, which grows
    without bound when a whole class moves away from its row. So refresh them, every epoch or by a moving average.

    Args:
        logits: `[n, C]`, any floating dtype; computed in float32 or better.
        labels: int64 `[n]`.
        rows: `[C, C]` class means of the softmax, or `[rows, C]` with `row_of_label`; see `floored`.
        strength: lambda, 0 <= lambda < 1.
        row_of_label: int64 `[C]`, the row of each label, where labels share rows.

    Raises:
        UsageError: a strength outside [0, 1).
    """
    check_strength(strength)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(wide, dim=1)
    cross_entropy = torch.nn.functional.nll_loss(log_p, labels)
    chosen = rows[labels if row_of_label is None else row_of_label[labels]].detach().to(log_p.dtype)
    # gradient through both factors P; written as sum P (ln P - ln Q), for kl_div takes its arguments in reverse
    divergence = (log_p.exp() * (log_p - chosen.log())).sum(dim=1).mean()
    return McmiTerms(cross_entropy - strength * divergence, cross_entropy, divergence)
