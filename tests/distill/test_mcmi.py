# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from calib.distill.information import ClassInformation
from calib.distill.mcmi import ROW_FLOOR, check_strength, floored, mcmi_loss
from calib.errors import UsageError


def problem() -> tuple[torch.Tensor, torch.Tensor, ClassInformation]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator, dtype=torch.float64) * 2
    labels = torch.arange(40) % 5
    information = ClassInformation(5)
    information.update(logits, labels)
    return logits, labels, information


def test_loss_is_cross_entropy_minus_strength_times_divergence() -> None:
    logits, labels, information = problem()
    rows = information.centroids()
    terms = mcmi_loss(logits, labels, rows, 0.25)
    p = torch.softmax(logits, 1).numpy()
    q = rows.numpy()[labels.numpy()]
    divergence = float(np.mean(np.sum(p * np.log(p / q), axis=1)))
    cross_entropy = -float(np.mean(np.log(p[np.arange(40), labels.numpy()])))
    assert float(terms.divergence) == pytest.approx(divergence, abs=1e-12)
    assert float(terms.loss) == pytest.approx(cross_entropy - 0.25 * divergence, abs=1e-12)
    assert float(terms.divergence) == pytest.approx(information.summary().cmi, abs=1e-12)


def test_with_fresh_rows_the_gradient_is_that_of_cmi_itself() -> None:
    # envelope theorem: the rows depend on the logits, but that dependence has no first-order effect
    logits, labels, information = problem()
    left = logits.clone().requires_grad_()
    mcmi_loss(left, labels, information.centroids(), 0.5).loss.backward()
    right = logits.clone().requires_grad_()
    p = torch.softmax(right, 1)
    onehot = torch.nn.functional.one_hot(labels).double()
    q = (onehot.T @ p) / onehot.sum(0)[:, None]
    cmi = (p * (p / q[labels]).log()).sum(1).mean()
    (torch.nn.functional.cross_entropy(right, labels) - 0.5 * cmi).backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-14)


def test_a_positive_strength_pushes_outputs_away_from_their_centroid() -> None:
    logits, labels, information = problem()
    moved = logits.clone().requires_grad_()
    terms = mcmi_loss(moved, labels, information.centroids(), 0.5)
    (terms.loss - terms.cross_entropy).backward()
    assert moved.grad is not None
    after = ClassInformation(5)
    after.update(logits - 0.5 * moved.grad * len(labels), labels)
    assert after.summary().cmi > information.summary().cmi


@pytest.mark.parametrize("strength", [-0.25, 1.0, 3.0, float("nan")])
def test_a_strength_that_would_minimise_or_diverge_is_refused(strength: float) -> None:
    with pytest.raises(UsageError, match="always maximises"):
        check_strength(strength)


def test_shared_rows_are_looked_up_by_group() -> None:
    logits, labels, _ = problem()
    rows = torch.full((2, 5), 0.2)
    group = torch.tensor([0, 1, 0, 1, 0])
    expected = mcmi_loss(logits, labels, rows[group], 0.3).loss
    assert float(mcmi_loss(logits, labels, rows, 0.3, row_of_label=group).loss) == float(expected)


def test_half_precision_is_computed_in_float32_and_empty_rows_stay_finite() -> None:
    logits = torch.tensor([[60000.0, 0.0]], dtype=torch.float16)
    terms = mcmi_loss(logits, torch.tensor([1]), floored(torch.tensor([[0.0, 1.0], [0.0, 1.0]])), 0.5)
    assert terms.loss.dtype == torch.float32
    assert float(terms.divergence) == pytest.approx(-np.log(ROW_FLOOR), rel=1e-6)
