# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

from calib.models.device import input_device


class Spread(nn.Module):
    """First parameter here, embedding elsewhere, as a model spread over devices has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.embedding = nn.Embedding(3, 2, device="meta")

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def test_inputs_go_where_the_embedding_is() -> None:
    assert input_device(Spread()) == torch.device("meta")


def test_without_an_embedding_the_first_parameter_decides() -> None:
    assert input_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert input_device(nn.ReLU()) == torch.device("cpu")
