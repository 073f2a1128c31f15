# SPDX-License-Identifier: Apache-2.0
"""Files in the authors' fields: what calib writes it reads back, and the numbers are those of the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calib.corpus import TokenBlocks
from calib.errors import ArtifactError
from calib.measurement.artifact import Measurement
from calib.models import OpenedModel
from calib.protocols.activation_stats import read_activation_stats, write_activation_stats
from calib.protocols.max_activations import compare_maxima, measured_rows
from calib.protocols.rows import CheckpointMaximum
from calib.schema.activation_stats import ActivationStatsFile, TopValuesFile
from tests.protocols.naive import naive_protocol

Run = tuple[OpenedModel, TokenBlocks, Measurement]

# every field that section 1.4's code writes per site of the five kinds
FIELDS = [
    "mean",
    "std",
    "abs_mean",
    "rms",
    "max",
    "min",
    "count",
    "sun_peak_abs",
    "sun_peak_token_median",
    "sun_peak_token_ratio",
    "sun_max_ratio",
    "sun_max_ratio_abs",
    "sun_max_ratio_median",
    "sun_mean_ratio",
    "sun_std_ratio",
    "sun_n_tokens",
    "sun_n_pass",
    "sun_t_val",
    "sun_t_ratio",
    "abs_median",
    "abs_q25",
    "abs_q75",
    "abs_q90",
    "abs_q99",
    "abs_q999",
    "abs_hist_count",
    "abs_hist_zero_frac",
]
HEADER = [
    "model_name",
    "model_path",
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "data_path",
    "num_samples",
    "max_seq_len",
    "global_max_activation",
    "global_max_location",
    "per_layer_stats",
]


@pytest.fixture(scope="module")
def written(massive_run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_activation_stats(massive_run[2], tmp_path_factory.mktemp("stats"))


def test_what_is_written_reads_back_as_measured(massive_run: Run, written: list[Path]) -> None:
    rows = read_activation_stats(written[0])
    measured = measured_rows(massive_run[2])
    assert [row.site for row in rows] == [row.site for row in measured]
    for row, expected in zip(rows, measured, strict=True):
        for name in ("min", "max", "mean", "std", "rms", "abs_mean", "abs_median", "abs_q999", "count"):
            assert getattr(row, name) == getattr(expected, name), (row.site.name, name)
        assert row.massive_tokens == expected.massive_tokens
    top, expected_top = CheckpointMaximum.of(rows), compare_maxima(massive_run[2]).measured
    assert (top.value, top.site, top.crest) == (expected_top.value, expected_top.site, expected_top.crest)


def test_all_fields_of_the_authors_are_there(massive_run: Run, written: list[Path]) -> None:
    raw = json.loads(written[0].read_text(encoding="utf-8"))
    assert set(raw) == {*HEADER, "calib"}
    assert written[0].name == f"{raw['model_name']}_activation_stats.json"
    assert set(raw["per_layer_stats"]["layer_1_hidden"]) == set(FIELDS)
    assert set(raw["per_layer_stats"]["layer_1_mlp_gate"]) == set(FIELDS[:7])
    assert all(isinstance(v, float) for site in raw["per_layer_stats"].values() for v in site.values())
    location, _, sign = raw["global_max_location"].partition(" ")
    field = sign.strip("()")
    assert raw["per_layer_stats"][location][field] == raw["global_max_activation"]
    assert (raw["num_hidden_layers"], raw["hidden_size"], raw["num_samples"]) == (3, 64, 8)
    assert raw["calib"]["dtype"] == "bfloat16"
    assert raw["calib"]["measurement_sha256"] == massive_run[2].sha256


def test_token_fields_equal_their_definition(massive_run: Run, written: list[Path]) -> None:
    opened, blocks, _ = massive_run
    stats = ActivationStatsFile.model_validate_json(written[0].read_text(encoding="utf-8")).per_layer_stats
    for name, naive in naive_protocol(opened, blocks, 4).items():
        if name.endswith("mlp_gate"):
            continue
        magnitudes = naive.values.abs().double()
        largest, median = magnitudes.amax(1).numpy(), magnitudes.median(1).values.numpy()
        ratio, one = largest / median, stats[name]
        assert one.sun_n_tokens == len(ratio)
        assert one.sun_n_pass == naive.massive
        assert one.sun_peak_abs == largest.max()
        assert one.sun_peak_token_ratio in ratio[largest == largest.max()]
        assert one.sun_max_ratio == ratio.max()
        assert one.sun_max_ratio_abs in largest[ratio == ratio.max()]
        assert one.sun_mean_ratio == pytest.approx(ratio.mean())
        assert one.sun_std_ratio == pytest.approx(ratio.std(), rel=1e-6)
        values = magnitudes.flatten().numpy()
        for field, q in (("abs_q25", 0.25), ("abs_median", 0.5), ("abs_q90", 0.9), ("abs_q99", 0.99)):
            assert getattr(one, field) == np.quantile(values, q, method="inverted_cdf"), (name, field)
        assert one.abs_hist_zero_frac == (values == 0).mean()


def test_the_top_values_are_those_of_the_tensor(massive_run: Run, written: list[Path]) -> None:
    opened, blocks, measurement = massive_run
    file = TopValuesFile.model_validate_json(written[1].read_text(encoding="utf-8"))
    naive = naive_protocol(opened, blocks, 4)
    for name, top in file.per_layer_stats.items():
        values = naive[name].values.flatten()
        assert top.topk_abs == values.abs().topk(100).values.tolist()
        assert sorted(map(abs, top.topk_signed), reverse=True) == top.topk_abs
        assert set(top.topk_signed) <= set(values.tolist())
        assert top.top_k == 100
    assert file.global_top5_abs[0] == compare_maxima(measurement).measured.magnitude


def test_a_file_of_the_authors_is_read_with_the_fields_it_has(tmp_path: Path) -> None:
    basic = {"mean": 0.1, "std": 1.0, "abs_mean": 0.5, "rms": 1.5, "max": 3.0, "min": -7968.0, "count": 1024.0}
    path = tmp_path / "Some-1B_activation_stats.json"
    record = {
        "model_name": "Some-1B",
        "model_path": "/models/Some-1B",
        "model_type": "qwen2",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "data_path": "data.jsonl",
        "num_samples": 5000,
        "max_seq_len": 32768,
        "global_max_activation": -7968.0,
        "global_max_location": "layer_0_hidden (min)",
        "per_layer_stats": {
            "layer_0_hidden": {**basic, "abs_q999": 10.0, "sun_n_pass": 3.0, "top5_of_tomorrow": 1.0},
            "layer_0_moe_gate": {**basic, "min": -9999.0},
        },
    }
    path.write_text(json.dumps(record), encoding="utf-8")
    top = CheckpointMaximum.of(read_activation_stats(path, family="Some"))
    assert (top.checkpoint, top.family, top.value, top.site) == ("Some-1B", "Some", -7968.0, "layer_0_hidden")
    assert (top.crest, top.over_q999, top.massive_tokens) == (5312.0, pytest.approx(796.8), 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no JSON"),
        ("{}", "model_name"),
        ("[1]", "pass a file"),
        (
            '{"model_name":"x","num_hidden_layers":1,"hidden_size":1,"global_max_activation":1,'
            '"global_max_location":"","per_layer_stats":{"Layer 1":{"mean":0,"std":0,"abs_mean":0,"rms":0,"max":0,'
            '"min":0,"count":0}}}',
            "Layer 1",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=says) as caught:
        read_activation_stats(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        read_activation_stats(tmp_path / "missing.json")


def test_an_unwritable_folder_is_named(massive_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_activation_stats(massive_run[2], tmp_path / "nowhere")
