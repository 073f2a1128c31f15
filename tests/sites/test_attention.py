# SPDX-License-Identifier: Apache-2.0
"""Query, key and value are those that attention gets, and the lookup is restored whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from calib.measurement import Calibration
from calib.models import open_model
from calib.sites.attention import watch_attention
from calib.statistics import Observation, SiteStatistics

IDS = torch.arange(40).reshape(2, 20)
ATTENTIONS = {
    "tiny_llama": [f"model.layers.{i}.self_attn" for i in range(3)],
    "tiny_gpt2": [f"transformer.h.{i}.attn" for i in range(2)],
    "tiny_bert": [f"bert.encoder.layer.{i}.attention.self" for i in range(2)],
}


def lookup() -> object:
    return AttentionInterface.__dict__["get_interface"]


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_what_is_measured_is_what_attention_received(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(request.getfixturevalue(name), device="cpu").model
    received: list[tuple[torch.Tensor, ...]] = []
    attend = nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        received.append((query.clone(), key.clone(), value.clone()))
        return attend(query, key, value, *rest, **more)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    assert len(received) == len(ATTENTIONS[name])
    found = {known: site for site in calibration.sites().values() for known in (site.name, *site.aliases)}
    for module, tensors in zip(ATTENTIONS[name], received, strict=True):
        for part, tensor in zip(("query", "key", "value"), tensors, strict=True):
            site = found[f"{module}:{part}"]
            heads = site.channels // tensor.shape[3]
            # attention may have been handed each key and value once per query head that shares it
            values = tensor[:, :: tensor.shape[1] // heads].transpose(1, 2).flatten(2).numpy()
            context = Observation.of_tokens(IDS.numpy(), document=np.arange(2))
            expected = SiteStatistics.observe(values, context).to_tensors()
            measured = site.statistics.to_tensors()
            assert {key: array.tobytes() for key, array in measured.items()} == {
                key: array.tobytes() for key, array in expected.items()
            }, f"{module}:{part}"


def test_the_lookup_is_restored_after_the_block(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    before = lookup()
    with torch.no_grad(), Calibration(model):
        assert lookup() is not before
        model(IDS)
    assert lookup() is before


def test_the_lookup_is_restored_after_an_exception(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    before = lookup()
    with pytest.raises(KeyError), Calibration(model):
        raise KeyError
    assert lookup() is before

    def fail(module: nn.Module, args: object) -> None:
        raise ValueError

    model.get_submodule("model.layers.1").register_forward_pre_hook(fail)
    with pytest.raises(ValueError), torch.no_grad(), Calibration(model):  # noqa: PT011 - raised just above
        model(IDS)
    assert lookup() is before


def test_nested_watches_both_see_and_both_end() -> None:
    before = lookup()
    module = nn.Identity()
    seen: list[str] = []
    with (
        watch_attention({id(module): lambda part, tensor: seen.append(f"outer {part}")}),
        watch_attention({id(module): lambda part, tensor: seen.append(f"inner {part}")}),
    ):
        attend = AttentionInterface().get_interface("sdpa", None)
        heads = torch.randn(1, 2, 3, 4)
        attend(module, heads, heads, heads, None)
    assert sorted(seen) == sorted(f"{who} {part}" for who in ("inner", "outer") for part in ("query", "key", "value"))
    assert lookup() is before


def test_other_modules_pass_unseen_and_unchanged() -> None:
    heads = torch.randn(1, 2, 3, 4)
    plain = AttentionInterface().get_interface("sdpa", None)(nn.Identity(), heads, heads, heads, None)[0]
    with watch_attention({-1: lambda part, tensor: pytest.fail("another module was reported")}):
        watched = AttentionInterface().get_interface("sdpa", None)(nn.Identity(), heads, heads, heads, None)[0]
    assert torch.equal(plain, watched)


def test_nothing_is_wrapped_when_nothing_is_watched() -> None:
    before = lookup()
    with watch_attention({}):
        assert lookup() is before


def test_another_model_of_the_same_class_is_not_measured(tiny_llama: Path) -> None:
    mine, other = (open_model(tiny_llama, device="cpu").model for _ in range(2))
    with torch.no_grad(), Calibration(mine) as calibration:
        mine(IDS)
        other(IDS)
    site = calibration.sites()["model.layers.0.self_attn:query"]
    assert site.statistics.range.count_all == IDS.numel() * site.channels
