# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from calib.measurement import Measurement
from calib.scales import load_scales
from calib.schema.recipe import Recipe
from tests.cli.commands import SMALL, one_line, run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def write(path: Path, **sections: object) -> Path:
    path.write_text(yaml.safe_dump({"metadata": {"title": "t", "description": "d"}, **sections}))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_each_recipe_is_valid_for_each_command_it_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(path.read_text()))
    assert recipe.model_fields_set - {"metadata"}
    for command in recipe.model_fields_set - {"metadata"}:
        assert run(command, "-c", path, "--print-config") == 0
        printed = yaml.safe_load(capsys.readouterr().out)[command]
        given = getattr(recipe, command)
        assert {key: printed[key] for key in given} == given


def test_flags_beat_the_recipe_and_the_recipe_beats_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "r.yaml", measure={"samples": 9, "max-length": 64, "ignore": "router"})
    assert run("measure", "-c", path, "--samples", 7, "--print-config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)["measure"]
    assert (printed["samples"], printed["max-length"], printed["seed"]) == (7, 64, 0)
    assert printed["ignore"] == ["router"]


def test_what_is_printed_is_a_recipe_that_gives_the_same_measurement(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "a", *SMALL, "--print-config") == 0
    path = tmp_path / "r.yaml"
    path.write_text(capsys.readouterr().out)
    assert not (tmp_path / "a").exists()
    assert run("measure", tiny_llama, "-o", tmp_path / "a", *SMALL, "-q") == 0
    assert run("measure", tiny_llama, "-c", path, "-o", tmp_path / "b", "-q") == 0
    assert Measurement.load(tmp_path / "a").sha256 == Measurement.load(tmp_path / "b").sha256


def test_a_recipe_drives_quantize(measured: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", quantize={"bits": 6, "method": "percentile:99"})
    assert run("quantize", measured, "-c", path, "-o", tmp_path / "q", "-q") == 0
    scales = load_scales(tmp_path / "q")
    assert (scales.bits, scales.method) == (6, "percentile:99")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metadata: {title: t, description: d}\nmeasure: {sample: 3}\n", "measure.sample: no such option"),
        ("metadata: {title: t, description: d}\nmesure: {}\n", "mesure"),
        ("metadata: {title: t, description: d}\nmeasure: {samples: [1, 2]}\n", "takes one value"),
        ("measure: {samples: 3}\n", "metadata"),
        ("a: [", "is no YAML"),
        ("", "the file"),
    ],
)
def test_a_bad_recipe_is_one_line_and_exit_code_2(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert run("measure", "m", "-c", path, "-o", tmp_path / "x") == 2
    assert said in one_line(capsys.readouterr().err)


def test_a_missing_recipe_and_a_value_of_the_wrong_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("measure", "m", "-c", tmp_path / "none.yaml", "-o", tmp_path / "x") == 2
    assert "cannot be read" in one_line(capsys.readouterr().err)
    path = write(tmp_path / "r.yaml", measure={"samples": "many"})
    assert run("measure", "m", "-c", path, "-o", tmp_path / "x") == 2
    assert "samples" in capsys.readouterr().err
