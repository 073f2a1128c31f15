# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calib.distill.information import ClassInformation, NonFiniteLogits
from calib.errors import UsageError

CLASSES = 7


def sample(seed: int, count: int = 200, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (count,), generator=generator)


def measured(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> ClassInformation:
    information = ClassInformation(CLASSES, temperature=temperature)
    information.update(logits, labels)
    return information


def numpy_probabilities(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def brute_force_cmi(p: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for label in np.unique(y):
        members = p[y == label]
        centroid = members.mean(0)
        for row in members:
            total += float(np.sum(row * np.log(row / centroid)))
    return total / len(y)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cmi_is_the_definition_in_numpy(temperature: float) -> None:
    logits, labels = sample(0)
    p, y = numpy_probabilities(logits, temperature), labels.numpy()
    summary = measured(logits, labels, temperature).summary()
    assert summary.cmi == pytest.approx(brute_force_cmi(p, y), abs=1e-12)
    assert summary.log_likelihood == pytest.approx(np.log(p[np.arange(len(y)), y]).mean(), abs=1e-12)
    assert summary.accuracy == (p.argmax(1) == y).mean()


def test_separation_is_the_double_sum_over_pairs_of_other_classes() -> None:
    logits, labels = sample(1, count=60)
    p, y = numpy_probabilities(logits), labels.numpy()
    total = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] != y[j]:
                total -= float(p[i] @ np.log(p[j]))
    summary = measured(logits, labels).summary()
    assert summary.separation == pytest.approx(total / len(y) ** 2, abs=1e-12)
    assert summary.separation is not None
    assert summary.ncmi == pytest.approx(summary.cmi / summary.separation)


def test_ece_is_the_binned_definition() -> None:
    logits, labels = sample(2, scale=1.5)
    p, y = numpy_probabilities(logits), labels.numpy()
    confidence, hit = p.max(1), p.argmax(1) == y
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert measured(logits, labels).summary().ece == pytest.approx(expected, abs=1e-12)


def test_divergence_from_any_rows_is_cmi_plus_the_divergence_of_the_centroids() -> None:
    logits, labels = sample(3)
    information = measured(logits, labels)
    rows = torch.rand(CLASSES, CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.01
    rows = rows / rows.sum(1, keepdim=True)
    p, y = numpy_probabilities(logits), labels.numpy()
    direct = float(np.mean(np.sum(p * np.log(p / rows.numpy()[y]), axis=1)))
    assert information.divergence_from(rows) == pytest.approx(direct, abs=1e-9)
    right = information.summary().cmi + information.centroid_divergence_from(rows)
    assert abs(direct - right) < 1e-9
    assert information.centroid_divergence_from(rows) > 0.1
    assert information.divergence_from(information.centroids()) == pytest.approx(information.summary().cmi, abs=1e-12)


def test_cmi_lies_between_zero_and_the_entropy_of_the_output_given_the_class() -> None:
    logits, labels = sample(5)
    summary = measured(logits, labels).summary()
    assert 0 < summary.cmi < summary.output_entropy_given_class <= math.log(CLASSES)
    alike = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(6))[labels]
    assert measured(alike, labels).summary().cmi < 1e-12


def test_batches_equal_one_shot() -> None:
    logits, labels = sample(7)
    streamed = ClassInformation(CLASSES)
    for start in range(0, len(labels), 33):
        streamed.update(logits[start : start + 33], labels[start : start + 33])
    for left, right in zip(streamed._state(), measured(logits, labels)._state(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-12)


def test_two_shards_merge_to_the_whole() -> None:
    logits, labels = sample(8)
    left, right = measured(logits[:71], labels[:71]), measured(logits[71:], labels[71:])
    left.merge(right)
    whole = measured(logits, labels).summary().to_dict()
    for name, value in left.summary().to_dict().items():
        assert value == pytest.approx(whole[name], rel=1e-12, abs=1e-13), name


def test_float16_logits_are_taken_as_they_are() -> None:
    logits, labels = sample(9)
    half = logits.half()
    assert measured(half, labels).summary().cmi == measured(half.double(), labels).summary().cmi


def test_extreme_logits_stay_exact() -> None:
    logits = torch.tensor([[5e4, 0.0] + [0.0] * 5, [0.0, 5e4] + [0.0] * 5])
    summary = measured(logits, torch.tensor([0, 0])).summary()
    assert summary.cmi == pytest.approx(math.log(2), abs=1e-12)


def test_shared_rows_give_an_upper_bound_and_say_so() -> None:
    logits, labels = sample(10)
    grouped = ClassInformation(CLASSES, rows=3, row_of_label=torch.arange(CLASSES) % 3)
    grouped.update(logits, labels)
    assert grouped.summary().grouped
    assert grouped.summary().cmi > measured(logits, labels).summary().cmi


def test_an_absent_class_is_counted_and_has_a_uniform_row() -> None:
    logits, labels = sample(11)
    information = measured(logits, labels.clamp(max=CLASSES - 2))
    assert information.summary().absent_classes == 1
    torch.testing.assert_close(information.centroids()[-1], torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(2, CLASSES), torch.tensor([0, CLASSES]), "the model has 7 classes"),
        (torch.zeros(2, CLASSES), torch.tensor([0, -100]), "labels -100"),
        (torch.zeros(2, CLASSES + 1), torch.tensor([0, 1]), "expected"),
        (torch.full((2, CLASSES), math.nan), torch.tensor([0, 1]), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(UsageError if words != "NaN" else NonFiniteLogits, match=words):
        measured(logits, labels)


def test_regression_and_empty_data_are_refused() -> None:
    with pytest.raises(UsageError, match="regression"):
        ClassInformation(1)
    with pytest.raises(UsageError, match="no labelled sample"):
        ClassInformation(3).summary()
    with pytest.raises(UsageError, match="temperature"):
        ClassInformation(3, temperature=0)
