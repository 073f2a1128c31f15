# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from torch import nn

from calib.sites.structure import Structure


def test_a_model_that_is_itself_the_stack_has_its_children_as_blocks() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
    assert [(b.name, b.layer, b.first) for b in Structure.of(model).blocks] == [("0", 0, True), ("1", 1, False)]
