# SPDX-License-Identifier: Apache-2.0
"""`calib evaluate` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.scales import load_scales, save_scales
from calib.schema.evaluation import EvaluationFile
from calib.schema.scales import CureRecord
from tests.cli.commands import one_line, run

FEW = ["--samples", "4", "--max-length", "32", "-d", "builtin:speeches"]


@pytest.fixture(scope="module")
def scales(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "int8"
    assert run("quantize", measured, "-o", folder, "-q") == 0
    return folder


def test_the_table_has_a_row_per_form_and_the_worst_layers(
    tiny_llama: Path, scales: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", tiny_llama, "--scales", scales, *FEW) == 0
    out, err = capsys.readouterr()
    for word in ("float", "weights only", "dynamic per-token", "static", "down_proj", "median difference"):
        assert word in out
    assert "note: these blocks come from the texts of the calibration data" in out
    assert "evaluated 128 of 128 tokens" in err


def test_json_is_one_document(tiny_llama: Path, scales: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", tiny_llama, "--scales", scales / "scales.json", *FEW, "--json", "--inputs", "static") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = EvaluationFile.model_validate_json(out)
    assert [row.inputs for row in found.rows] == ["float", "static"]
    assert json.loads(out)["format"] == "calib.evaluation"


def test_no_scales_and_an_encoder(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", tiny_bert, *FEW, "-q", "--layers", "0") == 0
    out = capsys.readouterr().out
    assert "same top" in out
    assert "static" not in out


def test_a_prefix_of_the_scale_file_gets_a_row_without_it(
    tiny_llama: Path, scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = CureRecord(kind="prefix", summary="for a test", needs="prefix", settings={"token_ids": [5]})
    save_scales(load_scales(scales).model_copy(update={"cures": [record]}), tmp_path)
    assert run("evaluate", tiny_llama, "--scales", tmp_path, *FEW, "-q") == 0
    out = capsys.readouterr().out
    assert "float, no prefix" in out
    assert "float, with the prefix" in out


def test_options_come_from_a_recipe(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    options = "{samples: 3, max-length: 16, inputs: [none], data: [builtin]}"
    recipe.write_text(f"metadata: {{title: t, description: d}}\nevaluate: {options}\n")
    assert run("evaluate", tiny_llama, "-c", recipe, "--json", "--layers", "0") == 0
    found = EvaluationFile.model_validate_json(capsys.readouterr().out)
    assert [row.inputs for row in found.rows] == ["float", "none"]
    assert (found.corpus.blocks, found.corpus.max_length) == (3, 16)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--inputs", "static"], 2, "--scales"),
        (["--kv-cache", "static"], 2, "--scales"),
        (["--layers", "-1"], 2, "--layers"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--scales", "nowhere"], 1, "nowhere"),
        (["--ignore", "nonsense"], 2, "nonsense"),
        (["-d", "missing.txt"], 1, "missing.txt"),
    ],
)
def test_bad_options_are_one_line(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, says: str
) -> None:
    assert run("evaluate", tiny_llama, *FEW, *options) == code
    assert says in one_line(capsys.readouterr().err)


def test_scales_of_another_model_are_one_line(
    tiny_gpt2: Path, scales: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", tiny_gpt2, "--scales", scales, *FEW) == 1
    assert "another model" in one_line(capsys.readouterr().err)


def test_a_cured_model_is_evaluated_from_its_parent(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["--samples", "16", "--max-length", "32", "--batch-size", "4", "-d", "builtin:speeches", "-q"]
    # a target that nothing meets: smoothing and compensation are both tried
    assert run("quantize", tiny_llama, "-o", tmp_path / "cured", *corpus, "--cure", "auto", "--target", "1") == 0
    cures = {cure.kind for cure in load_scales(tmp_path / "cured").cures}
    assert cures
    options = ["--inputs", "static", "--convention", "compressed-tensors", "--json", "--layers", "0"]
    assert run("evaluate", tiny_llama, "--scales", tmp_path / "cured", *FEW, *options) == 0
    found = EvaluationFile.model_validate_json(capsys.readouterr().out)
    assert not any("rounded to the nearest here" in note for note in found.notes)
    ratio = found.rows[-1].ratio
    assert ratio is not None
    assert 0.99 < ratio.value < 1.01
    assert found.model.fingerprint == load_scales(tmp_path / "cured").model.fingerprint
