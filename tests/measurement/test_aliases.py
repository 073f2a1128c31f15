# SPDX-License-Identifier: Apache-2.0
"""A tensor with several readers is measured once, and a value that is not finite is located."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from calib.measurement.calibration import Calibration

IDS = torch.arange(40).reshape(2, 20)


def opened(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_query_key_and_value_projections_share_one_input(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    groups = [{site.name, *site.aliases} for site in calibration.sites().values()]
    shared = {f"model.layers.0.self_attn.{p}_proj:input" for p in "qkv"}
    assert any(shared <= names for names in groups)


def test_a_nan_closes_the_finite_gate(tiny_llama: Path) -> None:
    model = opened(tiny_llama)

    def plant(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        args[0][1, 9, 17] = torch.nan
        return args

    handle = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(plant)
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    handle.remove()
    (gate,) = (g for g in calibration.gates() if g.name == "finite")
    assert not gate.passed
    assert "model.layers.1.mlp" in gate.detail
    assert "9" in gate.detail


def test_a_plain_module_is_measured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    data = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), Calibration(model) as calibration:
        model(data)
    found = {name: s for s in calibration.sites().values() for name in (s.name, *s.aliases)}
    assert found["0:input"].statistics.range.amax == data.abs().max().item()
    assert "3:input" in found


def test_a_projection_that_names_its_norms_output_is_still_a_linear_input() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    # Phi-3 defines the one projection before the norm that feeds it: no alias says that it is an input
    name = "model.layers.0.self_attn.qkv_proj:input"
    site = calibration.sites()[name]
    assert site.kind == "norm_output"
    assert site.aliases == {name: "linear_input", "model.layers.0.input_layernorm:output": "norm_output"}
    assert site.kinds == {"norm_output", "linear_input"}


def test_a_tensor_with_one_name_has_no_alias(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    site = calibration.sites()["model.layers.0.mlp.down_proj:output"]
    assert (site.kind, site.aliases) == ("mlp_output", {})
