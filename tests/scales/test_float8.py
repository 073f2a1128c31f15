# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib.scales import float8_error
from calib.scales.float8 import float8
from calib.scales.measured import error_between


def test_every_rounding_equals_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-448, 448, 20_000), rng.standard_normal(20_000), rng.uniform(-0.02, 0.02, 20_000)])
    x = np.append(x, [0.0, 2**-10, 3 * 2**-11, 2**-9, 448.0, 1.0625, 1.1875]).astype(np.float32)
    reference = torch.from_numpy(x).to(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(float8(x).astype(np.float32), reference)


def test_values_beyond_the_end_saturate() -> None:
    np.testing.assert_array_equal(float8(np.array([460.0, -1e9])), [448, -448])


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "spiked", "relu"])
def test_the_error_equals_the_direct_computation(lab: Any, kind: str) -> None:
    for dtype, rel in (("bfloat16", 1e-9), ("float32", 0.01)):
        x = lab.values(kind) if dtype == "float32" else lab.bfloat16(lab.values(kind))
        scale = float(np.float32(np.abs(x).max() / np.float64(448)))
        expected, measured = (
            float8_error(lab.distribution(x, dtype)),
            error_between(x, float8(x / np.float64(scale)) * scale),
        )
        assert expected.rel_mae == pytest.approx(measured.rel_mae, rel=rel)
        assert expected.zeroed == pytest.approx(measured.zeroed, rel=rel, abs=1e-5)
        for name in ("sqnr_db", "body_sqnr_db"):
            assert getattr(expected, name) == pytest.approx(getattr(measured, name), abs=10 * np.log10(1 + rel)), name


def test_zeros_have_no_error(lab: Any) -> None:
    assert float8_error(lab.distribution(np.zeros(4, np.float32))).sqnr_db is None
