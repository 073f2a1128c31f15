# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.cli import COMMANDS
from calib.measurement.artifact import Measurement
from calib.scales import load_scales
from tests.cli.commands import SMALL, one_line, run


def test_measure_then_quantize_offline(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", measured, "--bits", 8, "-o", tmp_path / "int8") == 0
    printed = capsys.readouterr().out
    assert "verdict" in printed
    assert "absmax" in printed
    assert "dynamic per-token" in printed
    scales = load_scales(tmp_path / "int8")
    site = scales.tensors["model.layers.0.self_attn.q_proj:input"]
    assert "model.layers.0.self_attn.v_proj:input" in site.shared_with
    assert site.scale == pytest.approx(site.amax / 127, rel=1e-6)


def test_quantize_a_model_measures_it_first(tiny_llama: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny_llama, "-o", tmp_path / "int8", *SMALL, "-q") == 0
    assert load_scales(tmp_path / "int8").bits == 8
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_other_bits_write_scales_without_a_checkpoint(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", tiny_llama, "-o", tmp_path / "int4", "--bits", 4, *SMALL) == 0
    assert "no checkpoint" in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "int4").iterdir()] == ["scales.json"]


def test_measure_prints_the_peak_and_its_place(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL) == 0
    out = capsys.readouterr().out
    top = max(Measurement.load(tmp_path / "m").sites.values(), key=lambda s: s.statistics.range.amax)
    assert top.name in out
    assert "position" in out
    assert "gate finite: pass" in out


def test_json_output_is_one_document(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", measured, "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "calib.measurement"
    assert run("quantize", measured, "-o", tmp_path / "q", "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "calib.scales"


def test_report_and_sites_and_methods(measured: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", measured) == 0
    assert "residual" in capsys.readouterr().out
    assert run("sites", tiny_llama) == 0
    assert "model.layers.0.mlp.down_proj:input" in capsys.readouterr().out
    assert run("sites", tiny_llama, "--json") == 0
    assert json.loads(capsys.readouterr().out)["not_reached"] == []
    assert run("methods") == 0
    assert {"absmax", "percentile", "mse", "entropy"} <= set(capsys.readouterr().out.split())
    assert run("methods", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["absmax"] == {
        "name": "absmax",
        "summary": rows["absmax"]["summary"],
        "parameter": None,
        "needs_histogram": False,
    }
    assert rows["percentile"]["parameter"]["high"] == 100.0


def test_shards_merge_to_the_whole(measured: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for index in (0, 1):
        assert run("measure", tiny_llama, "-o", tmp_path / str(index), *SMALL, "-q", "--shard", f"{index}/2") == 0
    assert run("merge", tmp_path / "1", tmp_path / "0", "-o", tmp_path / "whole") == 0
    assert Measurement.load(tmp_path / "whole").sha256 == Measurement.load(measured).sha256
    assert run("merge", tmp_path / "1", "-o", tmp_path / "half") == 3


def test_two_runs_are_byte_equal(measured: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "again", *SMALL, "-q") == 0
    name = "measurement.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (measured / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--bits", "1"], 2, "bits"),
        (["--bits", "17"], 2, "bits"),
        (["--method", "abmax"], 2, "abmax"),
    ],
)
def test_bad_quantize_options(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert run("quantize", measured, "-o", tmp_path / "q", *arguments) == code
    assert says in one_line(capsys.readouterr().err)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["-d", "missing.txt"], 1, "missing.txt"),
        (["--dtype", "float64"], 2, "float64"),
        (["--sites", "nonsense_pattern"], 2, "nonsense_pattern"),
        (["--batch-size", "zero"], 2, "--batch-size"),
        (["--shard", "2/2"], 2, "--shard"),
        (["--shard", "x"], 2, "--shard"),
        (["--max-length", "100000000"], 1, "--max-length"),
    ],
)
def test_bad_measure_options(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "m", *SMALL[:6], *arguments) == code
    assert says in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_missing_model_and_missing_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("measure", tmp_path / "nowhere", "-o", tmp_path / "m") == 1
    assert "nowhere" in one_line(capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    assert run("quantize", tmp_path / "empty", "-o", tmp_path / "q") == 1
    assert "measurement.json" in one_line(capsys.readouterr().err)


def test_existing_output_is_refused_and_kept(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious").write_text("kept")
    assert run("quantize", measured, "-o", tmp_path / "q") == 2
    assert "--overwrite" in one_line(capsys.readouterr().err)
    assert (tmp_path / "q" / "precious").read_text() == "kept"
    assert run("quantize", measured, "-o", tmp_path / "q", "--overwrite", "-q") == 2  # calib did not write it
    assert "was not written by calib" in one_line(capsys.readouterr().err)
    assert (tmp_path / "q" / "precious").read_text() == "kept"
    assert run("quantize", measured, "-o", tmp_path / "q2", "-q") == 0
    assert run("quantize", measured, "-o", tmp_path / "q2", "-q") == 2
    assert run("quantize", measured, "-o", tmp_path / "q2", "--overwrite", "-q") == 0


def test_nan_weights_are_named(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert run("measure", broken, "-o", tmp_path / "m", *SMALL) == 1
    assert "up_proj" in one_line(capsys.readouterr().err)


def test_a_failed_gate_writes_the_measurement_but_no_scales(tiny_llama: Path, tmp_path: Path) -> None:
    assert run("measure", tiny_llama, "-o", tmp_path / "half", *SMALL, "-q", "--shard", "0/2") == 0
    assert run("quantize", tmp_path / "half", "-o", tmp_path / "q") == 3
    assert not (tmp_path / "q").exists()


def test_help_is_instant_and_complete() -> None:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "calib", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    heavy = "import sys, calib.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers', 'rich')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
    assert time.perf_counter() - begin < 60


def test_an_interrupt_keeps_what_was_measured(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ["measure", str(tiny_llama), "-o", str(tmp_path / "m"), "--samples", "4000", "--max-length", "32"]
    command = [sys.executable, "-m", "calib", *arguments, "--batch-size", "1", "-d", "builtin:speeches"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("measured"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    kept = Measurement.load(tmp_path / "m")
    assert 0 < len(kept.run.batches) < kept.run.planned_batches
    assert not kept.passed
