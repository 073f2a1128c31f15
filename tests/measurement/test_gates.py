# SPDX-License-Identifier: Apache-2.0
"""The gates of a run: what was never reached, and what came late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.corpus import TokenBlocks
from calib.errors import GateError, UsageError
from calib.measurement import Calibration, MeasureOptions, measure
from calib.measurement.gates import every_site_fired
from calib.models import open_model


class Branches(nn.Module):
    """One projection that always runs, one that runs on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare = nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
        y = self.always(x)
        return self.rare(y) if rare else y


def gate_of(calibration: Calibration, name: str = "every_site_fired") -> tuple[bool, str]:
    (gate,) = (g for g in calibration.gates() if g.name == name)
    return gate.passed, gate.detail


def test_a_module_that_never_runs_closes_the_gate_by_name() -> None:
    model = Branches()
    with torch.no_grad(), Calibration(model) as calibration:
        model(torch.randn(2, 4))
    passed, detail = gate_of(calibration)
    assert not passed
    assert "never reached: rare:input, rare:output" in detail
    assert "--ignore" in detail
    assert calibration.silent_ports() == ["rare:input", "rare:output"]


def test_what_is_ignored_may_be_silent() -> None:
    model = Branches()
    with torch.no_grad(), Calibration(model, ignore=["rare"]) as calibration:
        model(torch.randn(2, 4))
    assert gate_of(calibration)[0]


def test_what_runs_late_is_measured_and_opens_the_gate() -> None:
    model = Branches()
    with torch.no_grad(), Calibration(model) as calibration:
        model(torch.randn(2, 4))
        output = model(torch.randn(3, 4), rare=True)
    assert gate_of(calibration)[0]
    assert calibration.sites()["rare:output"].statistics.range.amax == output.abs().max().item()


def test_a_module_that_never_runs_closes_the_gate_of_a_measurement(tiny_llama: Path, blocks: TokenBlocks) -> None:
    opened = open_model(tiny_llama, device="cpu")
    opened.model.model.layers[1].unused = nn.Linear(3, 3)
    measurement = measure(opened, blocks, MeasureOptions(batch_size=4, weights=False))
    assert not measurement.passed
    failed = [gate for gate in measurement.gates if not gate.passed]
    assert [gate.name for gate in failed] == ["every_site_fired"]
    assert "model.layers.1.unused:input" in failed[0].detail


def test_many_silent_ports_are_counted() -> None:
    gate = every_site_fired([f"p{i}" for i in range(9)], "20 ports")
    assert gate.detail.startswith("never reached: p0, p1, p2, p3, p4 and 4 more;")


def test_patterns_that_leave_nothing_are_refused() -> None:
    model = Branches()
    with (
        pytest.raises(GateError, match="no tensor of this model is left"),
        torch.no_grad(),
        Calibration(model, sites=["always"], ignore=["linear_input", "linear_output"]),
    ):
        model(torch.randn(2, 4))


def test_kinds_are_wanted_under_every_name_of_a_tensor(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    with torch.no_grad(), Calibration(model, sites=["linear_input"]) as calibration:
        model(torch.arange(20).reshape(1, 20))
    readers = {name for site in calibration.sites().values() for name in (site.name, *site.aliases)}
    projections = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {f"{name}:input" for name in projections} <= readers
    assert all("linear_input" in site.kinds for site in calibration.sites().values())


def test_a_kind_that_is_ignored_takes_only_tensors_that_it_names(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    with torch.no_grad(), Calibration(model, ignore=["linear_input"]) as calibration:
        model(torch.arange(20).reshape(1, 20))
    sites = calibration.sites()
    assert "model.layers.0.mlp.down_proj:input" not in sites
    assert sites["model.layers.0.self_attn.q_proj:input"].kind == "norm_output"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"statistics": "all"}, "statistics 'all'"),
        ({"sink_positions": -1}, "sink positions -1"),
        ({"kernel": "cuda"}, "--kernel cuda"),
    ],
)
def test_unknown_options_are_usage_errors(option: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Calibration(Branches(), **option)  # type: ignore[arg-type]


def test_an_overflow_of_float16_comes_with_advice() -> None:
    model = Branches().half()
    model.always.weight.data.fill_(200.0)
    with torch.no_grad(), Calibration(model, ignore=["rare"]) as calibration:
        model(torch.full((2, 4), 300.0, dtype=torch.float16))
    passed, detail = gate_of(calibration, "finite")
    assert not passed
    assert "always:output" in detail
    assert "--dtype bfloat16" in detail
