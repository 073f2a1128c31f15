# SPDX-License-Identifier: Apache-2.0
"""`Calibration` measures what a naive hook sees and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.errors import UsageError
from calib.measurement.calibration import Calibration

IDS = torch.arange(40).reshape(2, 20)


def opened(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m.__dict__.get("_forward_hooks_always_called", ()))
        for m in model.modules()
    )


def test_outputs_are_bit_identical_and_no_hook_survives(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    before = hooks(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with Calibration(model):
            measured = model(IDS).logits
    assert torch.equal(plain, measured)
    assert hooks(model) == before


def test_no_hook_survives_an_exception(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    before = hooks(model)
    with pytest.raises(KeyError), Calibration(model):
        raise KeyError
    assert hooks(model) == before


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_linear_inputs_equal_a_naive_hook(name: str, request: pytest.FixtureRequest) -> None:
    model = opened(request.getfixturevalue(name))
    seen: dict[str, float] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(f"{n}:input", a[0].abs().max().item()))
        for n, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    for handle in handles:
        handle.remove()
    found = {n: s for site in calibration.sites().values() for n in (site.name, *site.aliases) for s in [site]}
    assert seen
    for site, amax in seen.items():
        assert found[site].statistics.range.amax == amax, site


def test_a_planted_peak_is_found_with_value_and_place(tiny_llama: Path) -> None:
    model = opened(tiny_llama)

    def plant(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        args[0][1, 9, 17] = -4321.5
        return args

    handle = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(plant)
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS)
    handle.remove()
    peaks = calibration.sites()["model.layers.1.mlp.down_proj:input"].statistics.peaks
    assert peaks is not None
    assert (peaks.value[0], peaks.position[0], peaks.channel[0]) == (-4321.5, 9, 17)
    assert peaks.token_id[0] == IDS[1, 9]


def test_an_unknown_pattern_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError):
        Calibration(opened(tiny_llama), sites=["no.such.site"])
