# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from calib.distill.quantized.steps import PactQuantizer, learned_activation, learned_weight, start_of
from calib.quantized import IntegerGrid


def test_pact_clips_and_its_clip_learns_from_what_is_clipped() -> None:
    clip = nn.Parameter(torch.tensor(2.0))
    x = torch.tensor([-5.0, -1.0, 0.3, 1.9, 3.0], requires_grad=True)
    y = PactQuantizer(IntegerGrid.of(8), clip)(x)
    step = 2.0 / 127
    assert torch.allclose(y, torch.tensor([-2.0, -1.0, 0.3, 1.9, 2.0]), atol=step / 2)
    assert torch.equal(torch.round(y / step), (y / step).round())
    (y * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10_000.0])).sum().backward()
    # one gradient of -1 and one of 10,000, each with the sign of its end (Choi et al. 2018, eq. 3)
    assert clip.grad is not None
    assert x.grad is not None
    assert float(clip.grad) == -1.0 + 10_000.0
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 1000.0, 0.0]


def test_the_step_of_a_weight_learns_by_the_published_gradient() -> None:
    """Esser et al. 2020, eq. 3, with the gradient scale 1 / sqrt(N Q) of section 2.2, N values a row."""
    step = nn.Parameter(torch.tensor([0.5]))
    w = torch.tensor([[0.6, -0.2, 9.0]], requires_grad=True)
    grid = IntegerGrid.of(4)
    learned_weight(grid, step, 3).fake(w).sum().backward()
    position = torch.tensor([1.2, -0.4])
    expected = float((position.round() - position).sum() + grid.qmax) * (3 * grid.qmax) ** -0.5
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(expected, rel=1e-5)


def test_the_step_of_an_activation_has_the_scale_of_its_sample() -> None:
    step = nn.Parameter(torch.tensor(0.5))
    quantizer = learned_activation(IntegerGrid.of(8), step, 6, "tokens")
    x = torch.full((2, 6), 0.6)
    quantizer(x).sum().backward()
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(12 * (1 - 1.2) * (6 * 127) ** -0.5, rel=1e-4)


def test_first_steps_are_the_published_ones() -> None:
    rows = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    found = start_of(rows, 7)
    assert float(found[0]) == pytest.approx(2 * 2 / 7**0.5)
    assert float(found[1]) > 0
