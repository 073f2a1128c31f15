# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.errors import ModelError
from calib.models import check_token_ids, open_model
from calib.models.checks import check_finite, check_vocabulary


class Vocabulary:
    """A tokenizer with so many tokens, so many of them added later."""

    def __init__(self, base: int, added: int = 0) -> None:
        self.vocab_size = base
        self.added = added

    def __len__(self) -> int:
        return self.vocab_size + self.added


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_every_kind_of_nonfinite_weight_is_found(value: float, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    check_finite(module, "m")
    weight = torch.ones(4, 4)
    weight[2, 1:3] = value
    module[1].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=r"model m: 2 of 16 values of 1.weight are NaN or infinite; "):
        check_finite(module, "m")


def test_running_statistics_count_as_weights() -> None:
    module = nn.BatchNorm1d(3)
    module.running_var.fill_(float("inf"))
    module.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"1 of 3 values of bias are NaN or infinite \(and 1 other tensors\)"):
        check_finite(module, "m")


def test_a_mask_with_infinities_is_not_a_weight() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")))
    module.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    check_finite(module, "m")


def test_ids_without_a_row_in_the_embedding_are_refused(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    check_token_ids(torch.tensor([[0, 299]]), model)
    check_token_ids(torch.zeros(0, dtype=torch.int64), model)
    with pytest.raises(ModelError, match="token id 300: the embedding has 300 rows"):
        check_token_ids(torch.tensor([[0, 300]]), model)
    with pytest.raises(ModelError, match="token id -1: the embedding has 300 rows"):
        check_token_ids(torch.tensor([[-1, 3]]), model)


def test_a_module_without_an_embedding_reads_any_ids() -> None:
    check_token_ids(torch.tensor([10**9]), nn.Linear(2, 2))
    check_vocabulary(Vocabulary(10**9), nn.Linear(2, 2), "m")


def test_added_tokens_beyond_the_embedding_are_only_warned_about(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_model(tiny_llama, device="cpu").model
    check_vocabulary(Vocabulary(299, added=1), model, "m")
    assert caplog.text == ""
    check_vocabulary(Vocabulary(300, added=2), model, "m")
    assert "2 added tokens have no row in the embedding (300)" in caplog.text
    with pytest.raises(ModelError, match="the tokenizer has 301 tokens, the embedding 300 rows"):
        check_vocabulary(Vocabulary(301), model, "m")
