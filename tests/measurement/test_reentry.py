# SPDX-License-Identifier: Apache-2.0
"""A `Calibration` may be left and entered again, and what broke off leaves no trace but its gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calib.errors import GateError, ModelError, UsageError
from calib.measurement import Calibration, Site
from calib.models import OpenedModel, open_model

IDS = torch.arange(80).reshape(4, 20)


def tensors(sites: dict[str, Site]) -> dict[str, dict[str, bytes]]:
    return {
        name: {key: array.tobytes() for key, array in site.statistics.to_tensors().items()}
        for name, site in sites.items()
    }


def once(model: nn.Module) -> dict[str, Site]:
    with torch.no_grad(), Calibration(model) as calibration:
        model(IDS[:2])
        model(IDS[2:])
    return calibration.sites()


def test_two_entries_count_as_one(llama: OpenedModel) -> None:
    calibration = Calibration(llama.model)
    for part in (IDS[:2], IDS[2:]):
        with torch.no_grad(), calibration:
            llama.model(part)
    assert tensors(calibration.sites()) == tensors(once(llama.model))
    assert calibration.forwards == 2
    assert all(gate.passed for gate in calibration.gates())


def test_what_runs_between_two_entries_is_not_counted(llama: OpenedModel) -> None:
    calibration = Calibration(llama.model)
    with torch.no_grad():
        with calibration:
            llama.model(IDS[:2])
        llama.model(IDS)
        with calibration:
            llama.model(IDS[2:])
    assert tensors(calibration.sites()) == tensors(once(llama.model))


def test_entering_twice_at_once_is_refused(llama: OpenedModel) -> None:
    with (
        torch.no_grad(),
        Calibration(llama.model) as calibration,
        pytest.raises(UsageError, match="already inside"),
        calibration,
    ):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.model.modules())


def test_two_calibrations_of_one_model_do_not_disturb_each_other(llama: OpenedModel) -> None:
    with torch.no_grad(), Calibration(llama.model) as one, Calibration(llama.model) as other:
        llama.model(IDS[:2])
        llama.model(IDS[2:])
    assert tensors(one.sites()) == tensors(other.sites()) == tensors(once(llama.model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_broken_pass_closes_its_gate_and_spoils_nothing_else(
    tiny_llama: Path, error: type[BaseException], when: str
) -> None:
    model = open_model(tiny_llama, device="cpu").model
    calibration = Calibration(model)
    if when == "later":
        with torch.no_grad(), calibration:
            model(IDS[:2])

    def fail(*_: object) -> None:
        raise error

    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(fail)
    with pytest.raises(error), torch.no_grad(), calibration:
        model(IDS[2:])
    handle.remove()
    with torch.no_grad(), calibration:
        model(IDS[2:])
    gates = {gate.name: gate for gate in calibration.gates()}
    assert not gates["complete_passes"].passed
    assert "1 forward passes raised" in gates["complete_passes"].detail
    sites = calibration.sites()
    rows = 2 if when == "first" else 4
    # behind the place where it broke off no value was counted twice, and names are those of an unbroken run
    assert sites["model.layers.2:output"].statistics.range.count_all == rows * 20 * 64
    assert sites.keys() == once(model).keys()
    if when == "first":
        assert all(site.statistics.range.count_all == rows * 20 * site.channels for site in sites.values())


def test_an_input_that_outlives_a_broken_first_pass_is_measured_in_the_next() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.broken = nn.Linear(3, 3), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            if self.broken:
                raise ValueError("broken")
            return y

    model, x = Model(), torch.randn(5, 3)
    calibration = Calibration(model)
    with pytest.raises(ValueError, match="broken"), torch.no_grad(), calibration:
        model(x)
    model.broken = False
    with torch.no_grad(), calibration:
        model(x)
    assert calibration.sites()["linear:input"].statistics.range.count_all == 15


def test_documents_are_numbered_through_over_entries(llama: OpenedModel) -> None:
    calibration = Calibration(llama.model)
    for part in (IDS[:1], IDS[1:]):
        with torch.no_grad(), calibration:
            llama.model(part)
    documents = calibration.sites()["model.norm:output"].statistics.documents
    assert documents.document.tolist() == [0, 1, 2, 3]


def test_without_a_forward_pass_there_is_nothing_to_read(llama: OpenedModel) -> None:
    calibration = Calibration(llama.model)
    with calibration:
        pass
    with pytest.raises(GateError, match="no forward pass was run"):
        calibration.sites()


def test_a_model_that_lost_a_module_is_refused_and_left_without_hooks(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model
    calibration = Calibration(model)
    model.model.norm = None
    with pytest.raises(ModelError, match=r"model\.norm: is no longer in the model"), calibration:
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_annotations_hold_for_one_pass(llama: OpenedModel) -> None:
    with torch.no_grad(), Calibration(llama.model) as calibration:
        calibration.annotate(document=np.array([70, 80]), domain=np.array([1, 2], np.int16))
        llama.model(IDS[:2])
        llama.model(IDS[2:])
    documents = calibration.sites()["model.norm:output"].statistics.documents
    assert documents.document.tolist() == [2, 3, 70, 80]
    assert documents.domain.tolist() == [0, 0, 1, 2]
