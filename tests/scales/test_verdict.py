# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any, Never

import numpy as np
import pytest

from calib.scales import Judgement
from calib.scales.error import UNKNOWN
from calib.scales.verdict import cause_of_range, judge, judge_model, too_coarse
from calib.schema.scales import ExpectedError


def error(
    body: float | None = 30.0, rel_mae: float = 0.05, zeroed: float = 0.1, *, sqnr: float = 20.0
) -> ExpectedError:
    return ExpectedError(sqnr_db=sqnr, body_sqnr_db=body, rel_mae=rel_mae, clipped=0.001, zeroed=zeroed)


def never() -> Never:
    raise AssertionError("a good static scale needs no second opinion")


@pytest.mark.parametrize(
    ("figures", "fault"),
    [
        ({}, None),
        ({"body": None, "rel_mae": 0.0}, None),
        ({"body": 9.9}, "body SQNR 9.9 dB"),
        ({"sqnr": 0.5}, "SQNR 0.5 dB, 0.10% of the values are clipped"),
        ({"rel_mae": 0.6}, "relative MAE 0.60"),
        ({"zeroed": 0.7, "rel_mae": 0.3}, "70% of the values become 0 and relative MAE is 0.30"),
        ({"zeroed": 0.7, "rel_mae": 0.1}, None),  # tiny values vanish and carry little
        ({"zeroed": 0.99, "rel_mae": 0.05}, "99.0% of the values become 0"),
    ],
)
def test_what_makes_a_grid_too_coarse(figures: dict[str, Any], fault: str | None) -> None:
    assert too_coarse(error(**figures)) == fault


def test_a_fine_grid_is_static_and_nothing_else_is_computed() -> None:
    assert judge(error(), never, never) == Judgement("static", "body SQNR 30.0 dB")
    assert judge(error(body=None, rel_mae=0.0), never, never).reason == "no rounding error"


def test_a_grid_that_is_fine_per_token_is_dynamic() -> None:
    found = judge(error(body=0.5), lambda: error(body=25.0), lambda: "a spike")
    assert found.verdict == "dynamic-per-token"
    assert found.reason == "static: body SQNR 0.5 dB; a spike; dynamic per-token: body SQNR 25.0 dB"


def test_what_no_grid_holds_stays_in_float() -> None:
    assert judge(error(body=0.5), lambda: error(rel_mae=0.9), lambda: "a spike").verdict == "float"
    assert judge(error(body=0.5), None, lambda: "a spike").verdict == "float"
    unmeasured = judge(error(body=0.5), lambda: UNKNOWN, lambda: "a spike")
    assert (unmeasured.verdict, "not measured" in unmeasured.reason) == ("float", True)


def test_an_unknown_error_is_said_to_be_unknown() -> None:
    assert "unknown" in judge(UNKNOWN, never, never).reason


def test_the_worst_tensor_decides_for_the_model_and_others_are_counted() -> None:
    fine, dynamic, bad = (Judgement(v, "why") for v in ("static", "dynamic-per-token", "float"))
    assert judge_model([("a", fine), ("b", fine)]).verdict == "static"
    found = judge_model([("a", fine), ("b", dynamic), ("c", bad), ("d", dynamic)])
    assert found.verdict == "float"
    assert found.reason == "of 4 tensors 1 should stay in float, 2 need a scale per token; e.g. c: why"
    assert judge_model([]).verdict == "float"


def test_the_cause_is_named(lab: Any) -> None:
    x = lab.values("normal", 4 * 64 * 32).reshape(4, 64, 32).copy()
    x[:, 1, 3] = 3000
    assert cause_of_range(lab.statistics(x, sinks=4)).startswith("peak at sink positions 3000 against ")
    x[:, :, 3] = 3000
    assert cause_of_range(lab.statistics(x)).startswith("channel 3 reaches 3000, the median channel ")
    flat = lab.values("heavy-tailed", 100_000).reshape(1, 100_000, 1)
    assert cause_of_range(lab.statistics(flat)).endswith("x the 0.999 quantile of |x|")
    bare = replace(lab.statistics(flat), histogram=None, channels=None)
    assert cause_of_range(bare) == f"amax {np.abs(flat).max():.4g}"
