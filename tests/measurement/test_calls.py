# SPDX-License-Identifier: Apache-2.0
"""A module that is called several times in a forward pass has one site per call."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from calib.measurement import Calibration
from calib.models import open_model

LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"


def names_of(calibration: Calibration) -> dict[str, set[str]]:
    return {name: {name, *site.aliases} for name, site in calibration.sites().items()}


def test_every_call_of_a_shared_layer_is_a_site_of_its_own(rxnmapper: Path) -> None:
    opened = open_model(rxnmapper, device="cpu")
    layers = opened.model.config.num_hidden_layers
    assert layers == 12
    with torch.no_grad(), Calibration(opened.model) as calibration:
        opened.model(torch.arange(30).reshape(2, 15))
    known = set().union(*names_of(calibration).values())
    once = {
        "albert.embeddings.word_embeddings:output",
        "albert.embeddings.LayerNorm:output",
        "albert.encoder.embedding_hidden_mapping_in:input",
        "albert.encoder.embedding_hidden_mapping_in:output",
        "predictions.dense:input",
        "predictions.dense:output",
        "predictions.LayerNorm:output",
        "predictions.decoder:input",
    }
    shared = {
        *(f":{port}" for port in ("input", "output")),
        *(f".attention:{part}" for part in ("query", "key", "value")),
        *(
            f".{module}:{port}"
            for module in (*(f"attention.{p}" for p in ("query", "key", "value", "dense")), "ffn", "ffn_output")
            for port in ("input", "output")
        ),
        *(
            f".{norm}:{port}"
            for norm in ("attention.LayerNorm", "full_layer_layer_norm")
            for port in ("input", "output")
        ),
        ".activation:input",
    }
    assert known == once | {f"{LAYER}{port}#{call}" for port in shared for call in range(layers)}
    assert all(gate.passed for gate in calibration.gates())


def tiny_albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return AlbertForMaskedLM(config).eval()


def test_each_call_holds_the_values_of_that_call() -> None:
    model = tiny_albert()
    seen: list[torch.Tensor] = []
    ffn = model.get_submodule(f"{LAYER}.ffn")
    handle = ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad(), Calibration(model) as calibration:
        model(ids)
        model(ids + 40)
    handle.remove()
    assert len(seen) == 6
    known = {name: site for site in calibration.sites().values() for name in (site.name, *site.aliases)}
    for call in range(3):
        both = torch.stack([seen[call], seen[call + 3]])
        extent = known[f"{LAYER}.ffn:input#{call}"].statistics.range
        assert (extent.min, extent.max) == (both.min().item(), both.max().item())
        assert extent.count_all == both.numel()


def test_the_output_of_one_call_is_the_input_of_the_next() -> None:
    model = tiny_albert()
    with torch.no_grad(), Calibration(model) as calibration:
        model(torch.arange(40).reshape(2, 20))
    for call in range(2):
        (names,) = (n for n in names_of(calibration).values() if f"{LAYER}:output#{call}" in n)
        assert f"{LAYER}:input#{call + 1}" in names


def test_a_pattern_names_all_calls_of_a_module() -> None:
    model = tiny_albert()
    with torch.no_grad(), Calibration(model, sites=["*.ffn_output:input"]) as calibration:
        model(torch.arange(40).reshape(2, 20))
    assert list(calibration.sites()) == [f"{LAYER}.ffn_output:input#{call}" for call in range(3)]


def test_a_call_more_than_ever_before_is_measured() -> None:
    class Repeat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
            for _ in range(times):
                x = self.linear(x).relu()
            return x

    model = Repeat()
    with torch.no_grad(), Calibration(model, sites=["linear:input"]) as calibration:
        model(torch.randn(2, 4), 1)
        model(torch.randn(2, 4), 3)
    counts = {name: site.statistics.range.count_all for name, site in calibration.sites().items()}
    assert counts == {"linear:input#0": 16, "linear:input#1": 8, "linear:input#2": 8}
