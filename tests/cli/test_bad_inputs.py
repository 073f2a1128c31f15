# SPDX-License-Identifier: Apache-2.0
"""What goes wrong by the user's hand or the machine's ends in one line, the right exit code, and no half output."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calib.cli import own_process
from tests.cli.commands import SMALL, one_line, run

Capture = pytest.CaptureFixture[str]
FEW = SMALL[:6]


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model to be spoiled."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def measurement(measured: Path, tmp_path: Path) -> Path:
    """A measurement to be spoiled."""
    return Path(shutil.copytree(measured, tmp_path / "measurement"))


def beside(output: Path | None) -> list[Path]:
    """What lies where a folder is to be written."""
    return sorted(output.parent.iterdir()) if output is not None and output.parent.is_dir() else []


def refused(capture: Capture, code: int, *arguments: object) -> str:
    """Runs a command that must fail with that code and leave nothing; its one line."""
    output = Path(str(arguments[arguments.index("-o") + 1])) if "-o" in arguments else None
    before = beside(output)
    assert run(*arguments) == code
    errors = capture.readouterr().err
    assert "Traceback" not in errors
    assert beside(output) == before
    line = one_line(errors)
    assert ";" in line, "no next step"
    return line


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("blank.txt", b" \n\n ", "blank.txt"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("binary.txt", bytes(range(256)), "binary.txt"),
        ("photo.jpg", b"\xff\xd8\xff", "photo.jpg"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text"\n', "broken.jsonl"),
        ("broken.parquet", b"PAR1", "broken.parquet"),
        ("short.txt", b"Call me Ishmael.", "no document fills one block of 32 tokens"),
    ],
)
def test_data_that_cannot_be_used(
    tiny_llama: Path, tmp_path: Path, capsys: Capture, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    line = refused(capsys, 1, "measure", tiny_llama, "-o", tmp_path / "out", *FEW, "-d", tmp_path / name)
    assert says in line


def test_an_empty_folder_of_data(tiny_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "data").mkdir()
    line = refused(capsys, 1, "measure", tiny_llama, "-o", tmp_path / "out", *FEW, "-d", tmp_path / "data")
    assert "data" in line


@pytest.mark.parametrize("command", ["measure", "quantize", "sites"])
def test_a_folder_that_is_no_model_or_is_not_there(tmp_path: Path, capsys: Capture, command: str) -> None:
    output = [] if command == "sites" else ["-o", tmp_path / "out"]
    assert "nowhere" in refused(capsys, 1, command, tmp_path / "nowhere", *output)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, 1, command, tmp_path / "empty", *output)


def remote_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("raise SystemExit('this code was run')")


def nan_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def truncated_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def tampered_header(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")
    file.write_bytes(bytes(data))


def small_embedding(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:200].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))


def no_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize("command", ["measure", "quantize"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (remote_code, "--trust-remote-code"),
        (nan_weights, "64 of 64 values of model.norm.weight are NaN"),
        (truncated_weights, "model.safetensors is truncated or damaged"),
        (tampered_header, "model.safetensors is truncated or damaged"),
        (small_embedding, "the tokenizer has 300 tokens, the embedding 200 rows"),
        (no_config, "config.json is not valid JSON"),
    ],
)
def test_a_model_that_is_not_what_it_should_be(
    copy: Path, tmp_path: Path, capsys: Capture, command: str, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(copy)
    assert says in refused(capsys, 1, command, copy, "-o", tmp_path / "out", *SMALL)


def newer(folder: Path) -> None:
    record = json.loads((folder / "measurement.json").read_text())
    (folder / "measurement.json").write_text(json.dumps(record | {"version": "2.0"}))


def edited(folder: Path) -> None:
    record = json.loads((folder / "measurement.json").read_text())
    next(iter(record["sites"].values()))["amax"] = 1e9
    (folder / "measurement.json").write_text(json.dumps(record))


def no_json(folder: Path) -> None:
    (folder / "measurement.json").write_text("{")


def cut_arrays(folder: Path) -> None:
    file = folder / "measurement.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def no_arrays(folder: Path) -> None:
    (folder / "measurement.safetensors").unlink()


@pytest.mark.parametrize("command", ["quantize", "report", "merge"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (newer, "has version 2.0"),
        (edited, "amax is 1000000000.0, the arrays say"),
        (no_json, "is no JSON"),
        (cut_arrays, "differs from what measurement.json describes"),
        (no_arrays, "missing beside measurement.json"),
    ],
)
def test_a_measurement_that_is_not_what_it_should_be(
    measurement: Path, tmp_path: Path, capsys: Capture, command: str, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(measurement)
    output = [] if command == "report" else ["-o", tmp_path / "out"]
    assert says in refused(capsys, 1, command, measurement, *output)


def test_measurements_of_two_models(measured: Path, tiny_gpt2: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("measure", tiny_gpt2, "-o", tmp_path / "gpt2", *SMALL, "-q") == 0
    line = refused(capsys, 1, "merge", measured, tmp_path / "gpt2", "-o", tmp_path / "out")
    assert "differ in model" in line
    assert "is in both measurements" in refused(capsys, 1, "merge", measured, measured, "-o", tmp_path / "out")


@pytest.mark.parametrize("command", ["measure", "quantize"])
def test_out_of_memory_predicts_and_names_flags(
    tiny_llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def fail(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:
            raise MemoryError
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    line = refused(capsys, 1, command, tiny_llama, "-o", tmp_path / "out", *SMALL)
    assert "out of memory in a batch of 4 x 32 tokens, beside 0.0 GB of weights" in line
    assert "--batch-size 2" in line


def test_a_model_too_large_for_memory(
    tiny_llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.models.memory.available_bytes", lambda device: 1000)
    line = refused(capsys, 1, "measure", tiny_llama, "-o", tmp_path / "out", *SMALL)
    assert "--dtype bfloat16" in line


def test_more_tokens_than_the_model_has_positions(tiny_gpt2: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--samples", "1", "--max-length", "600", "-d", "builtin:speeches"]
    line = refused(capsys, 1, "measure", tiny_gpt2, "-o", tmp_path / "out", *arguments)
    assert "--max-length" in line


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [no_space, no_space_in_rust])
def test_a_full_disk_while_measuring(
    tiny_llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    monkeypatch.setattr("calib.measurement.artifact.save_file", fail)
    line = refused(capsys, 1, "measure", tiny_llama, "-o", tmp_path / "out", *SMALL, "-q")
    assert "free some space" in line


def test_a_full_disk_while_quantizing(
    measured: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_text", no_space)
    line = refused(capsys, 1, "quantize", measured, "-o", tmp_path / "out")
    assert "No space left" in line


@pytest.mark.parametrize("fail", [no_space, no_space_in_rust])
def test_a_full_disk_while_writing_a_checkpoint(
    tiny_llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    monkeypatch.setattr("calib.export.checkpoint.save_file", fail)
    line = refused(capsys, 1, "quantize", tiny_llama, "-o", tmp_path / "out", *SMALL, "-q")
    assert "space" in line


@pytest.mark.parametrize("command", ["measure", "quantize", "merge"])
def test_an_output_folder_in_use_is_kept(
    measured: Path, tiny_llama: Path, tmp_path: Path, capsys: Capture, command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    source = tiny_llama if command == "measure" else measured
    assert "--overwrite" in refused(capsys, 2, command, source, "-o", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, 2, command, source, "-o", tmp_path / "file")
    assert "is a file" in refused(capsys, 2, command, source, "-o", tmp_path / "file" / "out")
    assert (tmp_path / "out" / "precious").read_text() == "kept"


@pytest.mark.parametrize("command", ["measure", "quantize"])
def test_a_model_is_never_overwritten_by_its_result(copy: Path, capsys: Capture, command: str) -> None:
    assert "would replace" in refused(capsys, 2, command, copy, "-o", copy, "--overwrite", *SMALL)
    assert (copy / "model.safetensors").is_file()


def test_a_measurement_is_never_overwritten_by_its_scales(measurement: Path, capsys: Capture) -> None:
    assert "would replace" in refused(capsys, 2, "quantize", measurement, "-o", measurement, "--overwrite")
    assert (measurement / "measurement.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--max-length", "1"], "--max-length 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--batch-size", "²"], "--batch-size ²"),
        (["--shard", "0/0"], "--shard 0/0"),
        (["--sink-positions", "-1"], "sink positions -1"),
        (["--device", "tpu"], "tpu"),
        (["--task", "dancing"], "dancing"),
        (["--ignore", "re:("], "--ignore re:("),
    ],
)
def test_values_out_of_range(
    tiny_llama: Path, tmp_path: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    small = [*FEW, "-d", "builtin:speeches"]
    assert says in refused(capsys, 2, "measure", tiny_llama, "-o", tmp_path / "out", *small, *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "percentile:101"], "percentile:101"),
        (["--method", ""], "method"),
        (["--bits", "1"], "1"),
        (["--granularity", "per-channel", "--method", "mse"], "per-channel"),
        (["--sites", "nonsense"], "--sites nonsense"),
        (["--ignore", "re:("], "--ignore re:(: no regular expression"),
    ],
)
def test_choices_that_make_no_scales(
    measured: Path, tmp_path: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    assert says in refused(capsys, 2, "quantize", measured, "-o", tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["measure"],
        ["measure", "model"],
        ["nonsense"],
        ["quantize", "x", "-o", "y", "--bits", "many"],
        ["report", "--no"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], capsys: Capture) -> None:
    assert run(*arguments) == 2
    errors = capsys.readouterr().err
    assert "Error:" in errors
    assert "Traceback" not in errors


def test_a_name_that_no_file_can_have(tiny_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "too long; pass another path" in refused(capsys, 1, "measure", tiny_llama, "-o", tmp_path / ("n" * 300))


def test_what_nobody_foresaw_is_one_line_too(
    measured: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> Any:
        raise TypeError("no such thing\n" + "and more " * 100)

    monkeypatch.setattr("calib.scales.choose_scales", stop)
    arguments = ["quantize", measured, "-o", tmp_path / "out"]
    line = refused(capsys, 1, *arguments)
    assert line.startswith("calib: stopped by TypeError: no such thing and more")
    assert len(line) < 500
    assert run(*arguments, "-v", "-v") == 1
    assert "Traceback" in capsys.readouterr().err


def test_advice_of_transformers_is_for_those_who_ask_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    own_process(verbose=True)
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    own_process()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
