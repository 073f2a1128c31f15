# SPDX-License-Identifier: Apache-2.0
"""`--protocol` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.measurement.artifact import Measurement
from calib.protocols.activation_stats import read_activation_stats
from calib.protocols.max_activations import compare_maxima
from tests.cli.commands import SMALL, one_line, run

PROTOCOL = ["--protocol", "max-activations"]


@pytest.fixture(scope="module")
def by_protocol(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocol") / "measured"
    assert run("measure", tiny_llama, "-o", folder, *SMALL, *PROTOCOL, "-q") == 0
    return folder


def test_measure_writes_the_authors_files_and_records_the_protocol(by_protocol: Path, tiny_llama: Path) -> None:
    measurement = Measurement.load(by_protocol)
    assert (measurement.run.protocol, measurement.run.dtype) == ("max-activations", "bfloat16")
    assert {f.name for f in by_protocol.iterdir()} == {
        "measurement.json",
        "measurement.safetensors",
        f"{tiny_llama.name}_activation_stats.json",
        f"{tiny_llama.name}_top5_stats.json",
    }
    rows = read_activation_stats(by_protocol / f"{tiny_llama.name}_activation_stats.json")
    assert len(rows) == 4 * 3 + 2


def test_a_dtype_that_is_asked_for_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL, *PROTOCOL, "--dtype", "float32", "-q") == 0
    assert Measurement.load(tmp_path / "m").run.dtype == "float32"


def test_the_table_shows_the_model_among_27(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL, *PROTOCOL) == 0
    out = capsys.readouterr().out
    assert "gemma-3-27b-it" in out
    assert "+696,320" in out
    assert "2605.15572" in out
    assert "rank 28 of 28" in out
    assert f"{tiny_llama.name}_activation_stats.json" in out.replace("\n", "")


def test_json_is_one_document_with_rank_and_published_rows(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL, *PROTOCOL, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    comparison = compare_maxima(Measurement.load(tmp_path / "m"))
    assert record["rank"] == comparison.rank == 28
    assert record["measured"]["value"] == comparison.measured.value
    assert len(record["published"]) == 27
    assert sum(one["overflows_float16"] for one in record["published"]) == 4


def test_merged_shards_hold_what_one_run_holds(by_protocol: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for index in (0, 1):
        shard = ["--shard", f"{index}/2", *PROTOCOL, "-q"]
        assert run("measure", tiny_llama, "-o", tmp_path / str(index), *SMALL, *shard) == 0
        assert not list((tmp_path / str(index)).glob("*_stats.json"))
    assert run("merge", tmp_path / "0", tmp_path / "1", "-o", tmp_path / "whole") == 0
    name = f"{tiny_llama.name}_activation_stats.json"
    assert (tmp_path / "whole" / name).read_bytes() == (by_protocol / name).read_bytes()


@pytest.mark.parametrize("option", [["--add-bos"], ["--chat-template"], ["--statistics", "ranges"]])
def test_options_against_the_protocol_are_usage_errors(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL, *PROTOCOL, *option) == 2
    assert option[0] in one_line(capsys.readouterr().err)
    assert not (tmp_path / "m").exists()


def test_sanity_of_a_measurement_is_shown_beside_16_published_rows(
    by_protocol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", by_protocol, "-o", tmp_path / "q", "--protocol", "int8-sanity") == 0
    out = capsys.readouterr().out
    assert "clip_q0.999_linear" in out
    assert "gemma-3-4b-it" in out
    assert "the same rows" in out
    assert [f.name.endswith("_quant_sanity.json") for f in (tmp_path / "q").iterdir()] == [True]
    more = ["--sites", "layer_0_hidden", "--sites", "model.norm:output", "--json"]
    assert run("quantize", by_protocol, "-o", tmp_path / "q2", "--protocol", "int8-sanity", *more) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["published"]) == 16
    assert [row["site"] for row in record["measured"][::3]] == ["layer_0_hidden", "model.norm:output"]


def test_sanity_of_a_model_takes_thresholds_from_a_third_of_its_batches(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--samples", "6", "--max-length", "32", "--batch-size", "2", "-d", "builtin:speeches", "--json"]
    assert run("quantize", tiny_llama, "-o", tmp_path / "q", "--protocol", "int8-sanity", *rows) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["held_out"]
    assert {(r["calibration_samples"], r["eval_samples"]) for r in record["measured"]} == {(2, 4)}


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--bits", "4"], 2, "--bits"),
        (["--shard", "0/2"], 2, "--shard"),
        (["--add-bos"], 2, "int8-sanity"),
        (["--samples", "8", "--batch-size", "8"], 3, "batches"),
    ],
)
def test_what_the_sanity_check_cannot_do_is_said(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, says: str
) -> None:
    assert run("quantize", tiny_llama, "-o", tmp_path / "q", *SMALL, "--protocol", "int8-sanity", *options) == code
    assert says in one_line(capsys.readouterr().err)
    assert not (tmp_path / "q").exists()


def test_sanity_needs_a_measurement_whose_gates_hold(tiny_llama: Path, tmp_path: Path) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "half", *SMALL, "-q", "--shard", "0/2") == 0
    assert run("quantize", tmp_path / "half", "-o", tmp_path / "q", "--protocol", "int8-sanity") == 3
