# SPDX-License-Identifier: Apache-2.0
"""Patterns of `--sites` and `--ignore`."""

from __future__ import annotations

import pytest

from calib.errors import UsageError
from calib.sites import Port, Selection

DOWN = "model.layers.3.mlp.down_proj:input"
PORTS = [
    Port("model.layers.3.mlp.down_proj", "input", "linear_input", 1),
    Port("model.layers.3", "output", "residual", 0),
    Port("model.layers.30", "output", "residual", 2),
]


@pytest.mark.parametrize(
    "pattern",
    [
        "linear_input",
        DOWN,
        "*.down_proj:input",
        "model.layers.3.mlp.down_proj",
        "model.layers.3",
        "model.layers.?.mlp*",
        "re:model.layers.[0-9]+.mlp",
        "re:.*down_proj:input$",
    ],
)
def test_a_pattern_keeps_and_ignores_what_it_matches(pattern: str) -> None:
    assert Selection([pattern]).keeps([DOWN], "linear_input")
    assert not Selection(ignored=[pattern]).keeps([DOWN], "linear_input")


@pytest.mark.parametrize(
    "pattern",
    ["residual", "down_proj:input", "model.layers.3.mlp.down", "*.down_proj", "re:layers", "re:.*down_proj$", "*DOWN*"],
)
def test_a_pattern_leaves_alone_what_it_does_not_match(pattern: str) -> None:
    assert not Selection([pattern]).keeps([DOWN], "linear_input")
    assert Selection(ignored=[pattern]).keeps([DOWN], "linear_input")


def test_a_module_is_not_taken_for_another_whose_name_begins_alike() -> None:
    assert not Selection(["model.layers.3"]).keeps(["model.layers.30:output"], "residual")


def test_without_a_pattern_everything_is_kept() -> None:
    assert Selection().keeps([DOWN], "linear_input")


def test_what_is_ignored_wins() -> None:
    assert not Selection(["linear_input"], [DOWN]).keeps([DOWN], "linear_input")


def test_any_name_of_a_tensor_may_match() -> None:
    names = ["model.norm:output", "lm_head:input"]
    assert Selection(["lm_head"]).keeps(names, "final_norm")
    assert not Selection(ignored=["lm_head"]).keeps(names, "final_norm")


def test_a_tensor_is_wanted_under_each_of_its_kinds_and_ignored_under_the_first() -> None:
    assert Selection(["linear_input"]).keeps(["norm:output", "q:input"], "norm_output", ["linear_input"])
    assert not Selection(["gate"]).keeps(["norm:output", "q:input"], "norm_output", ["linear_input"])
    assert Selection(ignored=["linear_input"]).keeps(["norm:output", "q:input"], "norm_output", ["linear_input"])


def test_a_broken_expression_says_which_one() -> None:
    with pytest.raises(UsageError, match=r"--ignore re:\(: no regular expression"):
        Selection(ignored=["re:("])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("residul", "did you mean residual"),
        ("model.layers.3.mlp.down_proj:inputs", f"did you mean {DOWN}"),
        ("zzz", "`calib sites MODEL` lists all names"),
    ],
)
def test_a_pattern_without_a_match_gets_a_hint(pattern: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"--sites {pattern}: matches no site.*{hint}"):
        Selection([pattern]).check(PORTS)


def test_patterns_that_match_pass_the_check() -> None:
    Selection(["residual", "*.mlp.*"], ["model.layers.30"]).check(PORTS)
