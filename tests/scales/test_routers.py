# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from calib.scales.routers import router_layers

LINEARS = ["h.0.gate", "h.1.router.layer", "h.2.moe.gate", "h.2.moe.shared.up", "h.10.gate"]


@pytest.mark.parametrize(
    ("router", "layers"),
    [
        ("h.0.gate", {"h.0.gate"}),
        ("h.1.router", {"h.1.router.layer"}),
        ("h.2.moe", set()),  # a whole block of experts
        ("h.3.router", set()),  # multiplies by a parameter of its own
        ("h.1", {"h.1.router.layer"}),  # not what is in h.10
    ],
)
def test_a_router_is_a_linear_layer_or_holds_the_only_one(router: str, layers: set[str]) -> None:
    assert router_layers([router], LINEARS) == layers
