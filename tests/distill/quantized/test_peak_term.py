# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.distill.networks import make_network
from calib.distill.quantized import PeakControl, PeakTerm
from calib.distill.quantized.peak_term import kurtosis, l4, peak, peak_to_mean, weight_range
from calib.errors import UsageError


def test_the_terms_are_what_their_definitions_say() -> None:
    x = torch.tensor([3.0, -4.0, 0.0, 0.0])
    assert float(peak(x)) == pytest.approx(4 / 2.5)
    assert float(peak_to_mean(x)) == pytest.approx(4 / 1.75)
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
    for term in (peak_to_mean, peak, kurtosis):
        assert float(term(1000 * x)) == pytest.approx(float(term(x)), rel=1e-5)


def test_the_gradient_by_a_value_that_makes_up_the_rms_vanishes_for_peak_and_not_for_peak_to_mean() -> None:
    size, count, outlier = 0.3, 10_000, 200.0
    slopes = {}
    for term in (peak, peak_to_mean):
        x = torch.full((count,), size)
        x[7] = outlier
        x.requires_grad_()
        term(x).log().backward()
        assert x.grad is not None
        slopes[term] = float(x.grad[7]) * outlier  # d ln term / d ln outlier
    rest = count - 1
    assert slopes[peak] == pytest.approx(rest * size**2 / (outlier**2 + rest * size**2), rel=1e-3)
    assert slopes[peak_to_mean] == pytest.approx(rest * size / (outlier + rest * size), rel=1e-3)
    assert slopes[peak_to_mean] > 40 * slopes[peak]


def test_what_projections_read_and_write_is_among_the_default_sites(minilm_like: Path) -> None:
    from calib.models import open_model

    model = open_model(minilm_like, task="feature-extraction", device="cpu").model
    for term in ("peak_to_mean", "peak", "kurtosis"):
        names = {port.name for port in PeakTerm(model, PeakControl(term)).ports}
        for layer in range(2):
            assert f"encoder.layer.{layer}.output.dense:output" in names
            assert f"encoder.layer.{layer}.attention.output.dense:output" in names
            assert f"encoder.layer.{layer}.intermediate.dense:output" in names
            assert f"encoder.layer.{layer}.attention.output.LayerNorm:input" in names  # the sum, in mid-block


def test_an_outlier_of_a_feed_forward_half_is_taken_down(minilm_like: Path) -> None:
    """As in MiniLM: one feature of the first token is so large that it makes up the rms of its tensor."""
    from calib.models import open_model

    model = open_model(minilm_like, task="feature-extraction", device="cpu").model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    first, second = model.encoder.layer[0].intermediate.dense, model.encoder.layer[0].output.dense
    ids = torch.randint(10, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    seen: list[torch.Tensor] = []
    second.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        direction = model.encoder.layer[0].attention.output(
            *[model.embeddings(ids)] * 2  # about what the feed-forward half reads
        )[0, 0]
        first.weight[0] = 20 * direction / direction.norm()
        second.weight[3, 0] = 20.0
        model(ids)
    before = float(peak(seen[-1]))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    with PeakTerm(model, PeakControl()) as term:
        for _ in range(10):
            model(ids)
            value = term.take().log()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    assert before > 15
    assert float(peak(seen[-1])) < 0.5 * before


def test_logits_are_not_among_the_default_sites() -> None:
    for network, head in (("vit_micro", "head"), ("resnet8", "fc")):
        model = make_network(network, 10, channels=1, size=28)
        names = {port.name for port in PeakTerm(model, PeakControl()).ports}
        assert f"{head}:input" in names
        assert f"{head}:output" not in names


@pytest.mark.parametrize("name", ["peak_to_mean", "peak", "kurtosis", "l4", "range"])
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
    with PeakTerm(model, PeakControl("peak", sites=tuple(attention))) as term:
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
