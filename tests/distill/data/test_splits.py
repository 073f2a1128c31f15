# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from calib.distill.data import Records, split_off, spread_over_classes, stratified_share
from calib.errors import UsageError

LABELS = [0] * 100 + [1] * 40 + [2] * 3


def test_a_share_holds_its_part_of_every_class_and_at_least_one() -> None:
    chosen = stratified_share(LABELS, 0.05, seed=1)
    assert Counter(LABELS[n] for n in chosen) == {0: 5, 1: 2, 2: 1}
    assert chosen == sorted(set(chosen))
    assert chosen == stratified_share(LABELS, 0.05, seed=1)
    assert chosen != stratified_share(LABELS, 0.05, seed=2)
    assert stratified_share(LABELS, 1.0) == list(range(len(LABELS)))


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    shares = [set(stratified_share(LABELS, share)) for share in (0.05, 0.1, 0.25, 0.75)]
    assert all(small < large for small, large in pairwise(shares))


def test_validation_data_share_no_sample_with_training_data() -> None:
    records = Records([f"text {n}" for n in range(len(LABELS))], tuple(LABELS), ("a", "b", "c"), "test")
    parts = split_off(records, 0.1)
    assert not set(parts.train.inputs) & set(parts.validation.inputs)
    assert len(parts.train) + len(parts.validation) == len(records)
    assert Counter(parts.validation.labels) == {0: 10, 1: 4, 2: 1}
    for part in (parts.train, parts.validation):
        for text, label in zip(part.inputs, part.labels, strict=True):
            assert LABELS[int(text.split()[1])] == label


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        stratified_share(LABELS, share)
    with pytest.raises(UsageError, match="leaves nothing"):
        split_off(Records(["x"], (0,), ("a",), "test"), 0.5)


def test_the_first_samples_of_each_class_come_first() -> None:
    assert spread_over_classes([1, 1, 1, 0, 0, 2], 4) == [3, 0, 5, 4]
    assert spread_over_classes([1, 1, 0], 9) == [2, 0, 1]
