# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from calib.errors import ArtifactError, GateError, UsageError
from calib.scales import choose_scales, compare_methods, json_schema, load_scales, parse_method, save_scales

METHODS = ["absmax", "percentile:99.9", "mse", "entropy"]


@pytest.fixture
def measurement(lab: Any) -> Any:
    rng = np.random.default_rng(0)
    spiked = rng.standard_normal((4, 64, 16)).astype(np.float32)
    spiked[:, 0, 3] = 3000
    return lab.measurement(
        lab.site("model.layers.0.mlp.down_proj:input", spiked, sinks=1),
        lab.site("model.layers.0.self_attn.q_proj:input", rng.standard_normal((4, 64, 16)).astype(np.float32)),
        lab.weight("model.layers.0.mlp.down_proj", rng.standard_normal((8, 16)).astype(np.float32)),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_every_scale_is_positive_and_its_range_lies_in_what_was_seen(
    measurement: Any, method: str, symmetric: bool, bits: int
) -> None:
    scales = choose_scales(measurement, method=method, symmetric=symmetric, bits=bits)
    assert len(scales.tensors) == 3
    for tensor in scales.tensors.values():
        for scale in tensor.scale if isinstance(tensor.scale, list) else [tensor.scale]:
            assert scale is not None
            assert scale > 0
            assert np.float32(scale) == scale or float(str(np.float32(scale))) == scale
        assert max(abs(tensor.range_min), abs(tensor.range_max)) <= tensor.amax * (1 + 2**-8)


def test_absmax_covers_everything_and_mse_never_has_more_squared_error(measurement: Any) -> None:
    absmax, mse = (choose_scales(measurement, method=m).tensors for m in ("absmax", "mse"))
    for name, tensor in absmax.items():
        if tensor.kind != "weight":
            assert tensor.expected.clipped == 0
            assert mse[name].expected.sqnr_db >= tensor.expected.sqnr_db - 1e-6  # type: ignore[operator]


def test_a_sink_that_breaks_int8_is_named_as_the_cause(measurement: Any) -> None:
    scales = choose_scales(measurement)
    broken = scales.tensors["model.layers.0.mlp.down_proj:input"]
    assert broken.verdict == "dynamic-per-token"
    assert "sink" in broken.reason
    assert scales.tensors["model.layers.0.self_attn.q_proj:input"].verdict == "static"
    assert scales.verdict == "dynamic-per-token"


def test_comparison_has_a_row_per_method_and_the_dynamic_one(measurement: Any) -> None:
    labels = [row.label for row in compare_methods(measurement, METHODS)]
    assert labels[:4] == ["absmax", "percentile:99.9", "mse", "entropy"]
    assert "dynamic per-token" in labels


def test_per_channel_scales_are_lists_and_per_tensor_weights_are_numbers(measurement: Any) -> None:
    scales = choose_scales(measurement, granularity="per-channel", weight_granularity="per-tensor")
    for tensor in scales.tensors.values():
        assert isinstance(tensor.scale, float if tensor.kind == "weight" else list)


def test_a_tensor_of_zeros_gets_no_scale_and_its_reader_is_left_in_float(lab: Any) -> None:
    zeros = lab.measurement(
        lab.site("a.fc:input", np.zeros((2, 8, 4), np.float32)),
        lab.site("b.fc:input", np.ones((2, 8, 4), np.float32)),
    )
    scales = choose_scales(zeros)
    assert list(scales.tensors) == ["b.fc:input"]
    assert "a.fc" in scales.ignore


def test_nonfinite_values_never_reach_a_scale(lab: Any) -> None:
    values = np.ones((2, 8, 4), np.float32)
    values[1, 3, 2] = np.nan
    with pytest.raises(GateError, match=r"a\.fc:input"):
        choose_scales(lab.measurement(lab.site("a.fc:input", values)))


@pytest.mark.parametrize("text", ["abmax", "percentile:x", "percentile:101", "mse:3"])
def test_unknown_methods_and_parameters_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=text.partition(":")[0]):
        parse_method(text)


def test_a_scale_file_round_trips_and_follows_its_schema(measurement: Any, tmp_path: Path) -> None:
    scales = choose_scales(measurement)
    path = save_scales(scales, tmp_path)
    assert load_scales(tmp_path) == scales
    jsonschema.validate(json.loads(path.read_text()), json_schema())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[: len(t) // 2], "JSON"),
        (lambda t: t.replace('"version": "1.0"', '"version": "2.0"'), "version"),
        (lambda t: t.replace("calib.scales", "other.scales"), "format|scale"),
        (lambda t: t.replace('"verdict"', '"verdikt"', 1), "verdi"),
    ],
)
def test_damaged_scale_files_are_refused_in_one_line(measurement: Any, tmp_path: Path, change: Any, says: str) -> None:
    path = save_scales(choose_scales(measurement), tmp_path)
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(ArtifactError, match=says) as error:
        load_scales(path)
    assert "\n" not in str(error.value)
