# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from calib.distill.centroids import ClassBalancedBatches, MovingCentroids
from calib.distill.information import ClassInformation
from calib.errors import UsageError

CPU = torch.device("cpu")


def information(logits: torch.Tensor, labels: torch.Tensor) -> ClassInformation:
    found = ClassInformation(logits.shape[1])
    found.update(logits, labels)
    return found


def test_a_pass_sets_the_class_means() -> None:
    logits, labels = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    centroids = MovingCentroids()
    centroids.set(information(logits, labels), CPU)
    expected = torch.stack([torch.softmax(logits[labels == y].double(), 1).mean(0) for y in range(3)])
    torch.testing.assert_close(centroids.rows, expected.float())


def test_a_mini_batch_moves_only_the_classes_it_holds() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(30, 3, generator=generator), torch.arange(30) % 3
    centroids = MovingCentroids(momentum=0.9)
    centroids.set(information(logits, labels), CPU)
    before = centroids.rows.clone()
    batch = torch.randn(8, 3, generator=generator)
    centroids.move(batch, torch.ones(8, dtype=torch.long))
    torch.testing.assert_close(centroids.rows[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(centroids.rows[1], 0.9 * before[1] + 0.1 * torch.softmax(batch, 1).mean(0))


def test_balanced_batches_hold_equally_many_of_each_class_also_of_rare_ones() -> None:
    labels = [0] * 100 + [1] * 3 + [7] * 20
    batches = list(ClassBalancedBatches(labels, per_class=5))
    assert len(batches) == 1
    assert sorted(labels[i] for i in batches[0]) == [0] * 5 + [1] * 5 + [7] * 5
    assert len({i for i in batches[0] if labels[i] == 0}) == 5
    few = ClassBalancedBatches(labels, per_class=5, classes_per_batch=2)
    drawn = list(few)
    assert len(drawn) == len(few) == 2
    assert {labels[i] for batch in drawn for i in batch} == {0, 1, 7}


def test_balanced_batches_repeat_with_the_seed_and_change_with_the_round() -> None:
    labels = list(range(4)) * 30
    one, other = ClassBalancedBatches(labels, seed=3), ClassBalancedBatches(labels, seed=3)
    first = list(one)
    assert first == list(other)
    assert first != list(one)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="momentum"):
        MovingCentroids(1.0)
    with pytest.raises(UsageError, match="labels"):
        ClassBalancedBatches([])
