# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calib.distill.task import CausalLanguageTask, ClassificationTask, TokenTask
from calib.errors import UsageError


class Positions(nn.Module):
    """Logits `[n, t, 5]` that carry their input token and position."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids, 5).float())


def test_tuples_and_mappings_of_samples_are_one_thing() -> None:
    x, y, i = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    plain = ClassificationTask().decide(nn.Identity(), (x, y, i))
    assert torch.equal(plain.logits, x)
    assert torch.equal(plain.labels, y)
    assert plain.index is not None
    model = SimpleNamespaceModel()
    mapped = ClassificationTask().decide(model, {"x": x, "labels": y, "index": i, "text": ["a"] * 4})
    assert torch.equal(mapped.logits, x)
    assert torch.equal(mapped.index, i)


class SimpleNamespaceModel(nn.Module):
    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=x)


def test_the_class_of_a_position_is_the_next_token_and_padding_has_none() -> None:
    ids = torch.tensor([[1, 2, 3, 0], [4, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = CausalLanguageTask().decide(Positions(), {"input_ids": ids, "attention_mask": mask})
    assert found.labels.tolist() == [2, 3, 1]
    assert found.logits.argmax(1).tolist() == [1, 2, 4]


def test_positions_without_a_label_are_left_out() -> None:
    ids = torch.tensor([[1, 2, 3]])
    found = TokenTask().decide(Positions(), {"input_ids": ids, "labels": torch.tensor([[-100, 4, 0]])})
    assert found.labels.tolist() == [4, 0]
    assert found.logits.argmax(1).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": torch.zeros(2, 3)}, "no labels"),
        ("text", "batch of type str"),
        ((torch.zeros(2, 3), torch.tensor([0.5, 1.0])), "regression"),
        ((torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)), "multi-label"),
    ],
)
def test_what_is_no_classification_is_refused(batch: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ClassificationTask().decide(nn.Identity(), batch)
