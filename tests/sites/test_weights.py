# SPDX-License-Identifier: Apache-2.0
"""Weights are found once each, as matrices of outputs by inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.measurement.weights import measure_weights
from calib.models import open_model
from calib.sites import find_weights


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("tiny_llama", "model.embed_tokens", "lm_head"),
        ("tiny_gpt2", "transformer.wte", "lm_head"),
        ("tiny_bert", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ],
)
def test_a_tied_weight_is_found_once_under_its_first_name(
    name: str, embedding: str, head: str, request: pytest.FixtureRequest
) -> None:
    model = open_model(request.getfixturevalue(name), device="cpu").model
    weights = {weight.name: weight for weight in find_weights(model)}
    assert weights[f"{embedding}:weight"].tied == (head,)
    assert f"{head}:weight" not in weights
    assert weights[f"{embedding}:weight"].parameter.data_ptr() == model.get_submodule(head).weight.data_ptr()
    assert [w.tied for n, w in weights.items() if n != f"{embedding}:weight"] == [()] * (len(weights) - 1)


def test_an_untied_head_is_a_weight_of_its_own() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    weights = {weight.name: weight for weight in find_weights(LlamaForCausalLM(config))}
    assert {"model.embed_tokens:weight", "lm_head:weight"} <= weights.keys()
    assert all(weight.tied == () for weight in weights.values())


def test_names_and_layers_of_a_llama(tiny_llama: Path) -> None:
    found = {w.name: w.layer for w in find_weights(open_model(tiny_llama, device="cpu").model)}
    names = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    expected = {f"model.layers.{layer}.{name}:weight": layer for layer in range(3) for name in names}
    assert found == {"model.embed_tokens:weight": None, **expected}


def test_rows_are_outputs_also_where_a_layer_stores_its_weight_transposed(tiny_gpt2: Path) -> None:
    model = open_model(tiny_gpt2, device="cpu").model
    (weight,) = (w for w in find_weights(model) if w.module == "transformer.h.0.mlp.c_fc")
    assert tuple(weight.parameter.shape) == (64, 256)
    assert tuple(weight.matrix.shape) == (256, 64)
    hidden = torch.randn(3, 64)
    layer = model.get_submodule(weight.module)
    torch.testing.assert_close(hidden @ weight.matrix.T + layer.bias, layer(hidden))
    statistics = measure_weights(model)[weight.name].statistics
    assert statistics.row_max.tolist() == weight.parameter.amax(0).tolist()
    assert statistics.column_amax.tolist() == weight.parameter.abs().amax(1).tolist()


def test_a_convolution_is_a_matrix_of_outputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 5))
    (convolution, linear) = find_weights(model)
    assert tuple(convolution.matrix.shape) == (4, 12)
    assert tuple(linear.matrix.shape) == (5, 4)
