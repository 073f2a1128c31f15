# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib.scales import Grid, dynamic_per_token_error
from calib.scales.measured import error_between
from calib.scales.varying import per_row_error


def tensor(lab: Any, kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 128, 256))
    if kind == "tokens of different size":
        x *= rng.lognormal(0, 0.7, (8, 128, 1))
    if kind == "channels of different size":
        x *= rng.lognormal(0, 1, 256)
    if kind == "massive activations at sinks":
        x[:, 0, 7] = 3000 + 100 * rng.standard_normal(8)
    return x.astype(np.float32)


@pytest.mark.parametrize(
    "kind", ["normal", "tokens of different size", "channels of different size", "massive activations at sinks"]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_model_of_dynamic_scales_is_near_the_direct_computation(lab: Any, kind: str, bits: int) -> None:
    x = tensor(lab, kind)
    for dtype in ("float32", "bfloat16"):
        y = x if dtype == "float32" else lab.bfloat16(x)
        expected = dynamic_per_token_error(lab.site("a:input", y, sinks=4, dtype=dtype), bits=bits)
        qmax = Grid(bits).qmax
        scale = np.abs(y).max(axis=2, keepdims=True).astype(np.float64) / qmax
        measured = error_between(y, np.clip(np.rint(y / scale), -qmax, qmax) * scale)
        assert expected.estimated
        assert expected.clipped == 0
        assert expected.sqnr_db == pytest.approx(measured.sqnr_db, abs=0.5)
        assert expected.body_sqnr_db == pytest.approx(measured.body_sqnr_db, abs=0.5)
        assert expected.rel_mae == pytest.approx(measured.rel_mae, rel=0.05)
        assert expected.zeroed == pytest.approx(measured.zeroed, abs=0.08)


def test_equal_tokens_have_the_error_of_a_static_scale(lab: Any) -> None:
    row = lab.bfloat16(lab.values("heavy-tailed", 4096))
    x = np.broadcast_to(row, (2, 16, 4096))
    expected = dynamic_per_token_error(lab.site("a:input", x, dtype="bfloat16"))
    scale = np.abs(row).max() / np.float64(127)
    measured = error_between(x, np.rint(x / scale) * scale)
    assert expected.sqnr_db == pytest.approx(measured.sqnr_db, abs=0.01)
    assert expected.zeroed == pytest.approx(measured.zeroed, rel=0.01)


def test_tokens_of_zeros_have_no_error(lab: Any) -> None:
    error = dynamic_per_token_error(lab.site("a:input", np.zeros((2, 4, 8), np.float32)))
    assert (error.sqnr_db, error.rel_mae, error.zeroed) == (None, 0, 0)


def test_nothing_is_known_without_token_maxima(lab: Any) -> None:
    from dataclasses import replace

    site = lab.site("a:input", np.ones((2, 4, 8), np.float32))
    blind = replace(site, statistics=replace(site.statistics, tokens=None))
    assert dynamic_per_token_error(blind).rel_mae is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_model_of_rows_is_near_the_direct_computation(lab: Any, bits: int) -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((128, 512)) * rng.lognormal(0, 0.4, (128, 1))).astype(np.float32)
    w[5] = 0
    amax = np.abs(w).max(axis=1)
    qmax = Grid(bits).qmax
    scale = np.where(amax > 0, amax / qmax, 1).astype(np.float32)
    expected = per_row_error(lab.distribution(w), amax, scale)
    levels = np.clip(np.rint(w / scale[:, None].astype(np.float64)), -qmax, qmax)
    measured = error_between(w, levels * scale[:, None].astype(np.float64))
    assert expected.estimated
    # with the one level that 2 bits have, it matters which rows hold the values above half of their own maximum
    assert expected.sqnr_db == pytest.approx(measured.sqnr_db, abs=1.5 if bits == 2 else 0.5)
    assert expected.rel_mae == pytest.approx(measured.rel_mae, rel=0.2 if bits == 2 else 0.06)


def test_a_weight_of_zeros_has_no_error(lab: Any) -> None:
    zeros = np.zeros((3, 4), np.float32)
    assert per_row_error(lab.distribution(zeros), zeros.max(1), np.ones(3, np.float32)).rel_mae == 0
