# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from torch import nn

from calib.models.evaluating import evaluating


def test_modes_come_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval()))
    model.train()
    model[1][0].eval()
    with pytest.raises(RuntimeError), evaluating(model):  # noqa: PT012 - the block is what is tested
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, True, False]
