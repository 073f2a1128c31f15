# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from calib.distill.networks import make_network
from calib.distill.quantized import PeakControl, PeakTerm
from calib.distill.quantized.peak_term import kurtosis, l4, peak, weight_range
from calib.errors import UsageError


def test_the_terms_are_what_their_definitions_say() -> None:
    x = torch.tensor([3.0, -4.0, 0.0, 0.0])
    assert float(peak(x)) == pytest.approx(4 / 2.5)
    assert float(kurtosis(x)) == pytest.approx(((81 + 256) / 4) / 6.25**2)
    assert float(l4(x)) == pytest.approx((1 + (4 / 3) ** 4) / 4)
    torch.manual_seed(0)
    assert float(kurtosis(torch.randn(200_000))) == pytest.approx(3, abs=0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(1, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -5.0], [0.0, 2.0]]))
        model[2].weight.fill_(3.0)
    assert float(weight_range(model)) == 4.0


def test_peak_and_kurtosis_do_not_depend_on_the_size_of_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(50)
    for term in (peak, kurtosis):
        assert float(term(1000 * x)) == pytest.approx(float(term(x)), rel=1e-5)


@pytest.mark.parametrize("name", ["peak", "kurtosis", "l4", "range"])
def test_descending_along_a_term_lowers_it(name: str) -> None:
    torch.manual_seed(0)
    model = make_network("vit_micro", 3, channels=1, size=16)
    images = torch.randn(8, 1, 16, 16)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    with PeakTerm(model, PeakControl(name)) as term:  # type: ignore[arg-type]
        for _ in range(6):
            model(images)
            value = term.take()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(float(value))
    assert values[-1] < values[0]


def test_a_tensor_with_several_readers_counts_once_and_evaluation_does_not_count() -> None:
    model = make_network("vit_micro", 3, channels=1, size=16)
    attention = [f"layers.0.attention.{part}:input" for part in ("query", "key", "value")]
    seen = []
    with PeakTerm(model, PeakControl(sites=tuple(attention))) as term:
        with torch.no_grad():
            model(torch.randn(2, 1, 16, 16))
        model.layers[0].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
        model(torch.randn(2, 1, 16, 16))
        assert len(term._values) == 1
        assert float(term.take().detach()) == pytest.approx(float(peak(seen[0])))
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_padding_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.ones(2, 3, 4)
    x[1, 2] = 100.0
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with PeakTerm(model, PeakControl(sites=("0:input",))) as term:
        term.watch({"attention_mask": mask})
        model(x)
        assert float(term.take()) == 1.0
        term.watch((x, mask))
        model(x)
        assert float(term.take()) > 1.0


def test_terms_without_sites_are_refused() -> None:
    with pytest.raises(UsageError, match="no residual"):
        PeakTerm(nn.Sequential(nn.Linear(2, 2)), PeakControl("l4"))
    with pytest.raises(UsageError, match="matches no site"):
        PeakTerm(nn.Sequential(nn.Linear(2, 2)), PeakControl(sites=("nothing",)))
    model = nn.Sequential(nn.Linear(2, 2))
    with PeakTerm(model, PeakControl()) as term, pytest.raises(UsageError, match="reached none"):
        term.take()
    for wrong in ({"term": "x"}, {"share": 0.0}, {"share": 1.0}, {"term": "range", "sites": ("a",)}):
        with pytest.raises(UsageError):
            PeakControl(**wrong)  # type: ignore[arg-type]
