# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calib.distill.networks import make_network
from calib.distill.optimiser import OptimiserSettings
from calib.distill.quantized import FakeQuantization, PeakControl, QuantizationAware
from calib.distill.quantized.peak_term import peak
from calib.distill.student import StudentSettings, train_student
from calib.errors import UsageError
from calib.quantized import QuantizedModel


def aware_of(model: nn.Module, settings: FakeQuantization, images: torch.Tensor) -> tuple[QuantizationAware, Any]:
    def run() -> None:
        with torch.no_grad():
            model(images)

    aware = QuantizationAware(model, settings, run)
    aware.begin(run)
    return aware, run


@pytest.mark.parametrize("step", ["lsq", "pact", "absmax"])
@pytest.mark.parametrize("network", ["vit_micro", "resnet8"])
def test_passes_in_training_are_those_of_the_plan_that_is_handed_out(step: Any, network: str) -> None:
    torch.manual_seed(0)
    model = make_network(network, 3, channels=1, size=16).eval()
    images = torch.randn(4, 1, 16, 16)
    exact = model(images).detach()
    aware, _ = aware_of(model, FakeQuantization(4, 8, step=step, weight_step="lsq"), images)
    with torch.no_grad():
        trained = model(images)
    aware.switch_off()
    assert torch.equal(model(images), exact)
    assert not torch.equal(trained, exact)
    with torch.no_grad(), QuantizedModel(model, aware.learned_plan()) as quantized:
        assert torch.equal(model(images), trained)
    assert not quantized.silent()


def test_readers_of_one_tensor_share_a_step() -> None:
    model = make_network("vit_micro", 3, channels=1, size=16)
    aware, _ = aware_of(model, FakeQuantization(), torch.randn(2, 1, 16, 16))
    # patches, head, and in each of four layers: q/k/v, output, linear1, linear2
    assert len(aware.activation_steps) == 2 + 4 * 4
    assert len(aware.learned_plan().inputs) == 2 + 4 * 6
    aware.switch_off()


def test_steps_learn_stay_positive_and_the_model_gets_gradients() -> None:
    torch.manual_seed(0)
    model = make_network("vit_micro", 3, channels=1, size=16)
    aware, _ = aware_of(model, FakeQuantization(4, 4, weight_step="lsq"), torch.randn(2, 1, 16, 16))
    before = [step.detach().clone() for step in aware.parameters()]
    model(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert all(p.grad is not None for p in [*aware.parameters(), *model.parameters()])
    torch.optim.SGD(aware.parameters(), lr=1e6).step()
    aware.settle()
    aware.switch_off()
    assert any(not torch.equal(a, b) for a, b in zip(before, aware.parameters(), strict=True))
    assert all(bool((step > 0).all()) for step in aware.parameters())


def test_rounding_starts_at_its_share_of_the_training(mixture: Any) -> None:
    settings = StudentSettings(
        epochs=4,
        optimiser=OptimiserSettings("adamw", 1e-2),
        quantization=FakeQuantization(2, 2, start=0.5),
    )
    torch.manual_seed(1)
    run = train_student(make_network("mlp32", 10, channels=32, size=1), None, mixture.loader(), "ce", settings)
    losses = [record.loss for record in run.history]
    assert losses[1] < losses[0]
    assert losses[2] > losses[1]  # two bits cost something


@pytest.mark.parametrize("peaks", [None, PeakControl("peak", 0.3)])
def test_training_for_few_bits_beats_rounding_afterwards(mixture: Any, peaks: PeakControl | None) -> None:
    from calib.distill.cmi import measure_information
    from calib.quantized import IntegerGrid, WeightScheme, plan_from_scales

    def accuracy(model: nn.Module) -> float:
        return measure_information(model, mixture.loader("validation"))[0].summary().accuracy

    gains = []
    for seed in range(3):
        found = []
        for fake in (None, FakeQuantization(2, None, weight_step="lsq")):
            torch.manual_seed(seed)
            model = make_network("mlp32", 10, channels=32, size=1)
            settings = StudentSettings(
                epochs=12, optimiser=OptimiserSettings("adamw", 1e-2), seed=seed, quantization=fake, peaks=peaks
            )
            run = train_student(model, mixture.teacher, mixture.loader(), "kd", settings)
            plan = run.plan or plan_from_scales(model, inputs="none", weights=WeightScheme(IntegerGrid.of(2)))
            with QuantizedModel(model, plan):
                found.append(accuracy(model))
        gains.append(found[1] - found[0])
    assert sum(gains) / 3 > 0.02


def test_the_peak_term_lowers_peaks_of_what_is_trained(mixture: Any) -> None:
    found = []
    for control in (None, PeakControl("peak", 0.3)):
        torch.manual_seed(0)
        model = make_network("mlp32", 10, channels=32, size=1)
        settings = StudentSettings(epochs=8, optimiser=OptimiserSettings("adamw", 1e-2), peaks=control)
        run = train_student(model, mixture.teacher, mixture.loader(), "kd", settings)
        assert (run.history[-1].peak_term is None) == (control is None)
        hidden: list[torch.Tensor] = []
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        last.register_forward_pre_hook(lambda module, inputs, hidden=hidden: hidden.append(inputs[0]))
        with torch.no_grad():
            model(mixture.validation.tensors[0])
        found.append(float(peak(hidden[0])))
    assert found[1] < 0.9 * found[0]


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"weight_bits": 1}, {"weight_bits": None, "activation_bits": None}, {"start": 1.0}):
        with pytest.raises(UsageError):
            FakeQuantization(**wrong)  # type: ignore[arg-type]
