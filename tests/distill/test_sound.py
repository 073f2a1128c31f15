# SPDX-License-Identifier: Apache-2.0
"""Sound through the same interface: folders of .wav files, classifiers of transformers, recipes."""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from calib.distill.data import Records, SoundSet, read_records
from calib.distill.folders import open_classifier
from calib.errors import CorpusError
from calib.schema.distill import DistillReport
from tests.cli.commands import run

RATE = 2000
TONES = {"high": 400, "low": 60}
FAST = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0, "schedule": "constant"}


def write_tone(path: Path, hertz: float, samples: int, rate: int = RATE) -> None:
    values = 0.4 * np.sin(2 * math.pi * hertz * np.arange(samples) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, samples, "NONE", ""))
        file.writeframes((values * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tones, a folder each, of different lengths."""
    folder = tmp_path_factory.mktemp("sounds")
    for split, count in (("train", 10), ("test", 6)):
        for name, hertz in TONES.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                write_tone(folder / split / name / f"{number}.wav", hertz + 3 * number, 700 + 40 * number)
    return folder


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Wav2Vec2ForSequenceClassification of two layers, untrained."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    folder = tmp_path_factory.mktemp("wav2vec")
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 4),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        feat_extract_norm="layer",  # a norm over time would see the padding
        do_stable_layer_norm=True,
        mask_time_prob=0.0,
        layerdrop=0.0,
        id2label={0: "high", 1: "low"},
        label2id={"high": 0, "low": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    return folder


def test_sounds_become_padded_inputs_at_the_rate_of_the_model(sounds: Path, wav2vec: Path, tmp_path: Path) -> None:
    found = open_classifier(str(wav2vec), device="cpu")
    records = read_records(str(sounds), "train")
    assert records.class_names == ("high", "low")
    batch: Any = next(iter(found.batches(records.select([0, 9]))))
    assert batch["input_values"].shape == (2, 700 + 40 * 9)
    assert batch["attention_mask"].sum(1).tolist() == [700, 700 + 40 * 9]
    write_tone(tmp_path / "fast.wav", 60, 2 * RATE, rate=2 * RATE)
    other = found.dataset(Records([tmp_path / "fast.wav", torch.zeros(9)], (0, 1), ("high", "low"), "s"))
    assert [len(other[n][0]) for n in (0, 1)] == [RATE, 9]  # one second; tensors are taken as they are


def test_cmi_of_sounds_is_that_of_the_model(sounds: Path, wav2vec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("distill", "cmi", wav2vec, "-d", sounds, "--device", "cpu", "--json", "--batch-size", 1) == 0
    alone = json.loads(capsys.readouterr().out)["information"][0]
    assert alone["samples"] == 12
    assert run("distill", "cmi", wav2vec, "-d", sounds, "--device", "cpu", "--json", "--batch-size", 12) == 0
    together = json.loads(capsys.readouterr().out)["information"][0]
    assert together["log_likelihood"] == pytest.approx(alone["log_likelihood"], abs=1e-4)


def test_a_recipe_of_sound_trains_a_smaller_student_from_scratch(sounds: Path, wav2vec: Path, tmp_path: Path) -> None:
    training = {"epochs": 12, "batch_size": 4, "optimiser": FAST}
    recipe = {
        "metadata": {"title": "t", "description": "d"},
        "task": "audio-classification",
        "data": {"source": str(sounds), "validation_share": 0.2},
        "teacher": {"model": str(wav2vec), "fresh": {}, "training": training},
        "mcmi": {"epochs": 1, "batch_size": 4, "optimiser": {**FAST, "learning_rate": 1e-4}},
        "student": {
            "model": str(wav2vec),
            "fresh": {"num_hidden_layers": 1},
            "training": training,
            "frameworks": [{"name": "kd"}],
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("distill", "run", "-c", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--device", "cpu") == 0
    report = DistillReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert float(report.teachers[0].test["accuracy"] or 0) > 0.9
    assert report.students[3].accuracy > 0.7
    kept = open_classifier(str(tmp_path / "out" / "student-0-full-kd-mcmi-plain"), device="cpu")
    assert kept.model.config.num_hidden_layers == 1  # type: ignore[union-attr]
    assert kept.kind == "audio"


def test_what_is_no_sound_is_said(sounds: Path, tmp_path: Path) -> None:
    class Extractor:
        sampling_rate = RATE

    records = read_records(str(sounds), "test")
    with pytest.raises(CorpusError, match="no feature extractor"):
        SoundSet(records, None)
    (tmp_path / "a.wav").write_bytes(b"x")
    broken = SoundSet(Records([tmp_path / "a.wav", 3], (0, 1), ("high", "low"), "s"), Extractor())
    with pytest.raises(CorpusError, match="cannot be read as sound"):
        broken[0]
    with pytest.raises(CorpusError, match="sample 1 is no sound"):
        broken[1]
