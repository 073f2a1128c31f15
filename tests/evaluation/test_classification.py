# SPDX-License-Identifier: Apache-2.0
"""Classifiers and encoders, quantized against float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.errors import GateError, UsageError
from calib.evaluation.classification import collect, compare_classes, compare_embeddings

FLOAT = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0], [0.5, 1.0]])


def test_figures_of_a_case_worked_out_by_hand() -> None:
    quantized = FLOAT.copy()
    quantized[3] = [1.0, 0.5]
    found = compare_classes(quantized, FLOAT, np.array([0, 1, 1, 1]))
    assert found.items == 4
    assert found.agreement.value == 0.75
    assert (found.accuracy, found.float_accuracy) == (0.5, 0.75)
    assert found.difference is not None
    assert found.difference.value == -0.25
    assert found.sqnr_db == pytest.approx(10 * np.log10(16.25 / 0.5))


def test_the_difference_of_accuracies_is_paired() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 2))
    labels = rng.integers(0, 2, 400)
    quantized = logits.copy()
    quantized[:2] = quantized[:2, ::-1]  # two answers change
    found = compare_classes(quantized, logits, labels).difference
    assert found is not None
    assert found.high - found.low < 0.02  # unpaired, two accuracies near 0.5 are not known better than +- 0.04
    assert compare_classes(logits, logits, labels).difference == compare_classes(logits, logits, labels).difference


def test_equal_logits_have_no_error() -> None:
    found = compare_classes(FLOAT, FLOAT)
    assert (found.agreement.value, found.sqnr_db, found.accuracy, found.difference) == (1.0, None, None, None)


def test_cosines_of_a_case_worked_out_by_hand() -> None:
    found = compare_embeddings(np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert found.cosine.value == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert found.smallest_cosine == pytest.approx(np.sqrt(0.5))
    assert found.sqnr_db == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("quantized", "reference", "labels"),
    [
        (FLOAT, FLOAT[:3], None),
        (FLOAT[:0], FLOAT[:0], None),
        (FLOAT[0], FLOAT[0], None),
        (FLOAT, FLOAT, np.array([0, 1])),
    ],
)
def test_what_does_not_go_together_is_refused(quantized: Any, reference: Any, labels: Any) -> None:
    with pytest.raises(UsageError):
        compare_classes(quantized, reference, labels)


def test_an_embedding_without_direction_is_named() -> None:
    with pytest.raises(UsageError, match="item 1"):
        compare_embeddings(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones((2, 2)))


def test_outputs_are_collected_over_batches_of_both_forms() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = model(x).numpy()
    rows = collect(model, [x[:2], x[2:]], lambda output, batch: output)
    named = collect(model, [{"input": x[:2]}, {"input": x[2:]}], lambda output, batch: output)
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    np.testing.assert_array_equal(rows, named)
    assert rows.dtype == np.float32


def test_outputs_that_are_not_finite_and_no_output_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(GateError, match="NaN"):
        collect(model, [torch.full((1, 2), torch.nan)], lambda output, batch: output)
    with pytest.raises(UsageError, match="no batch"):
        collect(model, [], lambda output, batch: output)
