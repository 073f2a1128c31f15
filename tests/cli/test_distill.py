# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calib.cli import main
from calib.distill.classifier import Classifier
from calib.distill.information import ClassInformation
from calib.distill.network_folder import save_network
from calib.distill.networks import make_network
from calib.distill.task import ClassificationTask
from calib.distill.training_log import read_log
from calib.schema.distill import ImageInput


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:  # noqa: PT012 - a command that returns has succeeded
        main([str(a) for a in arguments])
        raise SystemExit(0)
    return int(stop.value.code or 0)


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A data set of vectors and a perceptron for it."""
    torch.manual_seed(0)
    for split in ("train", "test"):
        labels = torch.arange(60) % 3
        inputs = torch.nn.functional.one_hot(labels, 5).float() + 0.3 * torch.randn(60, 5)
        save_file({"inputs": inputs, "labels": labels}, tmp_path / f"{split}.safetensors")
    classifier = Classifier(
        model=make_network("mlp16", 3, channels=5, size=1),
        kind="image",
        classes=3,
        name="mlp",
        task=ClassificationTask(),
        image=ImageInput(size=1, channels=5),
    )
    (tmp_path / "mlp").mkdir()
    save_network(tmp_path / "mlp", classifier, "mlp16")
    return tmp_path


def test_cmi_prints_what_the_definition_gives(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("distill", "cmi", vectors / "mlp", "-d", vectors, "--device", "cpu")
    assert run(*arguments, "--temperature", 1, "--temperature", 4, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    from safetensors.torch import load_file

    from calib.distill.network_folder import load_network

    data = load_file(vectors / "test.safetensors")
    information = ClassInformation(3)
    with torch.no_grad():
        information.update(load_network(vectors / "mlp", "cpu").model(data["inputs"]), data["labels"])
    assert record["information"][0]["cmi"] == pytest.approx(information.summary().cmi, rel=1e-6)
    assert [one["temperature"] for one in record["information"]] == [1.0, 4.0]
    assert run(*arguments, "--samples", 30) == 0
    printed = capsys.readouterr().out
    assert "30 samples, 3 classes" in printed
    assert "NCMI" in printed


def test_cmi_of_something_that_is_no_classifier_is_one_line(
    tiny_bert: Path, vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", "cmi", tiny_bert, "-d", vectors) == 2
    assert "its task is fill-mask" in capsys.readouterr().err
    assert run("distill", "cmi", vectors / "mlp", "-d", vectors / "none") == 1
    assert "no such file" in capsys.readouterr().err


RECIPE = """
metadata: {{title: t, description: d}}
task: image-classification
data: {{source: {source}, image: {{size: 1, channels: 5}}}}
teacher: {{network: mlp16, training: {{epochs: 1, batch_size: 8}}}}
mcmi: {{epochs: 1}}
student: {{network: mlp16, training: {{epochs: 1, batch_size: 8}}, frameworks: [{{name: kd}}]}}
"""


def test_run_writes_a_report_and_prints_it(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (vectors / "recipe.yaml").write_text(RECIPE.format(source=vectors))
    arguments = ("distill", "run", "-c", vectors / "recipe.yaml", "-o", vectors / "out", "--device", "cpu")
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert "kd of mcmi" in printed
    assert "MCMI against control" in printed
    assert {path.name for path in (vectors / "out").iterdir()} == {
        "report.json",
        "README.md",
        "log.csv",
        "curves.png",
        "teacher-mll",
        "teacher-control",
        "teacher-mcmi",
        "student-0-full-ce-none-plain",
        "student-0-full-kd-mll-plain",
        "student-0-full-kd-control-plain",
        "student-0-full-kd-mcmi-plain",
    }
    rows = {row.training: row for row in read_log(vectors / "out" / "log.csv")}
    report = json.loads((vectors / "out" / "report.json").read_text())
    cmi = {row["teacher"]: row["train"]["cmi"] for row in report["teachers"]}
    assert rows["seed 0, teacher, lambda 0.25"].cmi == pytest.approx(cmi["mcmi"])
    assert rows["seed 0, teacher, lambda 0"].cmi == pytest.approx(cmi["control"])
    assert rows["seed 0, teacher"].cmi is None
    assert run(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "calib.distillation"


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_folder_in_the_place_of_the_checkpoints_is_kept(
    vectors: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (vectors / "out.checkpoints").mkdir()
    (vectors / "out.checkpoints" / "mine.safetensors").write_text("kept")
    recipe = vectors / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=vectors))
    assert run("distill", "run", "-c", recipe, "-o", vectors / "out", option) == 2
    assert "no folder of checkpoints" in capsys.readouterr().err
    assert (vectors / "out.checkpoints" / "mine.safetensors").read_text() == "kept"


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_report(vectors: Path) -> None:
    """SIGKILL while it works; two runs of one recipe differ in nothing, so neither may these."""

    def kept(folder: Path) -> dict[str, int]:
        """Files and when they were written; one may go while we look."""
        found = {}
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[str(path)] = path.stat().st_mtime_ns
        return found

    long = RECIPE.replace("epochs: 1, batch_size: 8", "epochs: 150, batch_size: 8").replace("epochs: 1}", "epochs: 4}")
    (vectors / "recipe.yaml").write_text(long.format(source=vectors))

    def command(out: str, *more: str) -> list[str]:
        arguments = ["distill", "run", "-c", str(vectors / "recipe.yaml"), "-o", str(vectors / out)]
        return [sys.executable, "-m", "calib", *arguments, "--device", "cpu", *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    for _ in range(3):  # each gets a little further: it is killed when it has kept something new
        before = kept(vectors / "broken.checkpoints")
        process = subprocess.Popen(command("broken", "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and kept(vectors / "broken.checkpoints") == before:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    assert not (vectors / "broken").exists()
    assert run(*command("broken")[3:]) == 2  # neither --resume nor --overwrite
    subprocess.run(command("broken", "--resume"), check=True, capture_output=True)
    assert not (vectors / "broken.checkpoints").exists()
    for name in ("report.json", "log.csv", "teacher-mcmi/model.safetensors"):
        assert (vectors / "broken" / name).read_bytes() == (vectors / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("extra: 1", "extra"),
        ("mcmi: {strengths: [-0.5]}", "between 0 and 1"),
        ("student: {network: mlp16, model: x, frameworks: [{name: kd}]}", "exactly one"),
        ("protocol: {kind: zero-shot}", "needs omitted"),
        ("a: [", "no YAML"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_field(
    vectors: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    key = change.partition(":")[0]
    lines = [line for line in RECIPE.format(source=vectors).splitlines() if not line.startswith(f"{key}:")]
    (vectors / "wrong.yaml").write_text("\n".join([*lines, change]))
    assert run("distill", "run", "-c", vectors / "wrong.yaml", "-o", vectors / "out") == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert "wrong.yaml" in printed
    assert not (vectors / "out").exists()


def test_cmi_of_a_language_model_names_its_rows_and_memory(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("distill", "cmi", tiny_llama, "-d", "builtin:speeches", "--samples", 8, "--max-length", 32)
    assert run(*arguments, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "248 samples, 300 classes" in printed
    assert "<= " in printed
    assert "upper bound" in printed
