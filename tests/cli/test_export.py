# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.export import FORMATS
from tests.cli.commands import one_line, run


@pytest.fixture(scope="module")
def scales(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales") / "int8"
    assert run("quantize", measured, "-o", folder, "-q") == 0
    return folder


def test_export_and_verify_from_the_command_line(
    scales: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("export", scales, "--to", "compressed-tensors", "--model", tiny_llama, "--kv-cache", "-o", out) == 0
    printed = capsys.readouterr().out
    assert "21 with a scale, keys and values of 3 attention layers, 1 in floating point" in printed
    assert "lm_head: the output head stays in floating point" in printed
    assert run("verify", out) == 0
    printed = capsys.readouterr().out
    assert "48 of 48 scales read, 0 missing" in printed
    assert "27 of 27 scales read, 0 defaulted" in printed
    assert "21 of 21 equal" in printed
    assert "passed" in printed


def test_verify_ends_with_exit_code_3_and_names_the_tensor(
    scales: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("export", scales, "--to", "compressed-tensors", "--model", tiny_llama, "-o", out, "-q") == 0
    (out / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    assert run("verify", out, "--json") == 3
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["passed"] is False
    assert content["scales_read"] < content["scales"]
    assert "q_proj.weight: is float32, must be int8" in one_line(printed.err)


def test_what_a_format_needs_is_said_before_any_work(
    scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to, said in (
        ("compressed-tensors", "--model"),
        ("imatrix", "--measurement"),
        ("ggml", "unknown"),
        ("aimet:9", "no variant"),
    ):
        assert run("export", scales, "--to", to, "-o", tmp_path / "out") == 2
        assert said in one_line(capsys.readouterr().err)
    assert run("verify", tmp_path) == 1
    assert "is no export" in one_line(capsys.readouterr().err)


def test_formats_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("formats") == 0
    printed = capsys.readouterr().out
    assert all(f"{name}" in printed for name in FORMATS)
    assert run("formats", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(FORMATS)
    assert all({"carries", "cures", "consumers", "proven"} <= row.keys() for row in rows)


def test_a_recipe_drives_export(scales: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("metadata: {title: t, description: d}\nexport: {to: csv}\n")
    assert run("export", scales, "-c", path, "-o", tmp_path / "out", "-q") == 0
    assert (tmp_path / "out" / "scales.csv").is_file()
