# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calib.errors import ArtifactError, GateError, UsageError
from calib.scales import Grid, choose_scales, compare_methods


def ranges_only(site: Any) -> Any:
    statistics = replace(site.statistics, histogram=None, channels=None, peaks=None, tokens=None)
    return replace(site, statistics=statistics)


def block(lab: Any, kind: str = "normal", seed: int = 0) -> np.ndarray:
    return lab.values(kind, 4 * 32 * 16, seed).reshape(4, 32, 16)


def test_modules_that_read_one_tensor_share_its_scale(lab: Any) -> None:
    names = [f"layers.0.{x}_proj:input" for x in "qkv"]
    site = lab.site(
        "layers.0.norm:output", block(lab), kind="norm_output", aliases=dict.fromkeys(names, "linear_input")
    )
    tensors = choose_scales(lab.measurement(site)).tensors
    assert list(tensors) == ["layers.0.norm:output"]
    tensor = tensors["layers.0.norm:output"]
    assert tensor.shared_with == names
    assert (tensor.module, tensor.port, tensor.kind) == ("layers.0.norm", "output", "norm_output")


def test_only_what_a_deployment_quantizes_decides_on_the_model(lab: Any) -> None:
    spiked = block(lab).copy()
    spiked[:, 0, 3] = 5000
    informs = lab.site("layers.0:output", spiked, kind="residual")
    quantized = lab.site("layers.0.fc:input", block(lab))
    scales = choose_scales(lab.measurement(informs, quantized))
    assert scales.tensors["layers.0:output"].verdict != "static"
    assert scales.verdict == "static"
    assert scales.coverage == {"linear_input": 1, "residual": 1}
    [row, *_] = compare_methods(lab.measurement(informs, quantized), ["absmax"])
    assert list(row.errors) == ["layers.0.fc:input"]


def test_a_linear_input_counts_whatever_kind_names_it(lab: Any) -> None:
    x = lab.values("normal", 4096).reshape(4, 16, 64)
    sites = [
        lab.site(
            "qkv:input", x, kind="norm_output", aliases={"qkv:input": "linear_input", "norm:output": "norm_output"}
        ),
        lab.site("out:output", x),
    ]
    scales = choose_scales(lab.measurement(*sites), bits=8, sites=["linear_input"])
    assert list(scales.tensors) == ["qkv:input", "out:output"]
    assert scales.tensors["qkv:input"].shared_with == ["norm:output"]
    ignored = choose_scales(lab.measurement(*sites), bits=8, ignore=["qkv"])
    assert ignored.ignore == ["qkv"]


def test_a_site_never_reached_is_a_gate_error(lab: Any) -> None:
    empty = lab.site("experts.7.fc:input", np.zeros((0, 4, 8), np.float32))
    with pytest.raises(GateError, match=r"^experts\.7\.fc:input: no value was seen; .*--ignore$"):
        choose_scales(lab.measurement(lab.site("fc:input", block(lab)), empty))


def test_infinite_values_are_located(lab: Any) -> None:
    x = block(lab).copy()
    x[2, 5, 7] = np.inf
    with pytest.raises(GateError, match=r"^fc:input: 1 NaN .* position 5, channel 7; "):
        choose_scales(lab.measurement(lab.site("fc:input", x)))
    weight = np.ones((2, 3), np.float32)
    weight[0, 0] = np.nan
    with pytest.raises(GateError, match=r"^fc:weight: 1 NaN"):
        choose_scales(lab.measurement(lab.weight("fc", weight)))


def test_what_is_ignored_is_listed_and_not_checked(lab: Any) -> None:
    bad = lab.site("head:input", np.full((1, 2, 3), np.nan, np.float32))
    scales = choose_scales(lab.measurement(lab.site("fc:input", block(lab)), bad), ignore=["head"])
    assert (list(scales.tensors), scales.ignore) == (["fc:input"], ["head"])


def test_sites_select_and_a_pattern_without_a_match_is_a_usage_error(lab: Any) -> None:
    both = lab.measurement(lab.site("a.fc:input", block(lab)), lab.site("b.fc:input", block(lab)))
    assert list(choose_scales(both, sites=["b.*"]).tensors) == ["b.fc:input"]
    assert list(compare_methods(both, ["absmax"], sites=["re:a"])[0].errors) == ["a.fc:input"]
    with pytest.raises(UsageError, match=r"^--ignore c: matches nothing that was measured; "):
        choose_scales(both, ignore=["c"])
    with pytest.raises(UsageError, match="none of the measured tensors is left"):
        choose_scales(both, ignore=["linear_input"])


def test_ranges_alone_suffice_for_absmax_whose_error_is_then_unknown(lab: Any) -> None:
    measurement = lab.measurement(ranges_only(lab.site("fc:input", block(lab))))
    tensor = choose_scales(measurement).tensors["fc:input"]
    assert tensor.scale is not None
    assert tensor.expected.rel_mae is None
    assert "unknown" in tensor.reason
    with pytest.raises(ArtifactError, match="only its range was measured, and mse needs a histogram"):
        choose_scales(measurement, method="mse")
    with pytest.raises(ArtifactError, match="its channels were not measured"):
        choose_scales(measurement, granularity="per-channel")
    with pytest.raises(ArtifactError, match="needs a histogram"):
        compare_methods(measurement, ["absmax"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"granularity": "per-group"}, "granularity 'per-group': unknown here"),
        ({"weight_granularity": "per-channel"}, "granularity 'per-channel': unknown here"),
        ({"granularity": "per-channel", "method": "mse"}, "per-channel scales span min and max"),
        ({"weight_method": "mse"}, "per-row scales span min and max"),
        ({"bits": 1}, "bits 1"),
        ({"method": "best"}, "method 'best': unknown"),
    ],
)
def test_impossible_requests_are_usage_errors(lab: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        choose_scales(lab.measurement(lab.site("fc:input", block(lab))), **arguments)


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_scales_follow_each_channel(lab: Any, symmetric: bool) -> None:
    x = block(lab) * np.arange(16, dtype=np.float32)
    measurement = lab.measurement(lab.site("fc:input", x))
    tensor = choose_scales(measurement, granularity="per-channel", symmetric=symmetric).tensors["fc:input"]
    grid = Grid(8, symmetric)
    assert isinstance(tensor.scale, list)
    for channel in range(1, 16):
        step = grid.step(float(x[..., channel].min()), float(x[..., channel].max()))
        assert step is not None
        assert np.float32(tensor.scale[channel]) == np.float32(step.scale)
    # the dead channel takes the scale of the whole tensor: no scale is 0 or invented
    whole = grid.step(float(x.min()), float(x.max()))
    assert whole is not None
    assert np.float32(tensor.scale[0]) == np.float32(whole.scale)
    assert tensor.expected.rel_mae is None
    assert "cannot be computed offline" in tensor.reason


def test_rows_of_a_weight_have_their_own_scales(lab: Any) -> None:
    w = np.array([[1, -2.54], [0, 0], [12.7, 3]], np.float32)
    measurement = lab.measurement(lab.weight("fc", w, tied=("head",)))
    tensor = choose_scales(measurement).tensors["fc:weight"]
    expected = np.array([2.54, 12.7, 12.7], np.float32).astype(np.float64) / 127
    np.testing.assert_array_equal(np.array(tensor.scale, np.float32), expected.astype(np.float32))
    assert tensor.expected.estimated
    assert (tensor.scheme.granularity, tensor.shared_with) == ("per-row", ["head:weight"])
    one = choose_scales(measurement, weight_granularity="per-tensor", weight_method="mse").tensors["fc:weight"]
    assert isinstance(one.scale, float)
    assert not one.expected.estimated


def test_asymmetric_rows_are_possible(lab: Any) -> None:
    w = np.abs(lab.values("normal", 64 * 32).reshape(64, 32))
    tensor = choose_scales(lab.measurement(lab.weight("fc", w)), weight_symmetric=False).tensors["fc:weight"]
    assert tensor.zero_point == [-128] * 64


def test_weights_too_coarse_for_their_bits_stay_in_float(lab: Any) -> None:
    w = lab.values("heavy-tailed", 64 * 1024).reshape(64, 1024)
    tensor = choose_scales(lab.measurement(lab.weight("fc", w)), bits=2).tensors["fc:weight"]
    assert tensor.verdict == "float"
    assert "quantile of |w|" in tensor.reason


@pytest.mark.parametrize("method", ["absmax", "mse", "entropy", "percentile"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["constant", "negative", "denormal", "tiny", "huge", "spike", "two values"])
def test_odd_tensors_get_a_usable_scale_or_none(lab: Any, name: str, symmetric: bool, method: str) -> None:
    x = {
        "constant": lambda: np.full((1, 4, 8), 0.37),
        "negative": lambda: -np.abs(block(lab)) - 1,
        "denormal": lambda: block(lab) * 1e-42,
        "tiny": lambda: block(lab) * 1e-30,
        "huge": lambda: block(lab) / np.abs(block(lab)).max() * 3.4e38,
        "spike": lambda: np.where(np.arange(2048).reshape(4, 32, 16) == 77, 3e4, block(lab)),
        "two values": lambda: np.sign(block(lab)),
    }[name]()
    scales = choose_scales(
        lab.measurement(lab.site("fc:input", x.astype(np.float32))), method=method, symmetric=symmetric
    )
    if name == "denormal":
        assert (scales.tensors, scales.ignore) == ({}, ["fc"])
        assert "no scale follows" in scales.left_out["fc:input"]
        return
    tensor = scales.tensors["fc:input"]
    assert isinstance(tensor.scale, float)
    assert 2.0**-126 <= tensor.scale < np.inf
    if name in ("constant", "two values") and method != "entropy":
        assert tensor.expected.rel_mae is not None
        assert tensor.expected.rel_mae < 0.01


def test_comparison_aggregates_over_tensors(lab: Any) -> None:
    spiked = lab.values("normal", 4 * 64 * 32).reshape(4, 64, 32).copy()
    spiked[:, 0, 3] = 5000  # one value in 2,048: the peak, not the body
    measurement = lab.measurement(
        lab.site("a.fc:input", block(lab), sinks=1),
        lab.site("b.fc:input", spiked, sinks=1),
        lab.site("c.fc:input", np.zeros((1, 2, 3), np.float32)),
    )
    rows = {row.label: row for row in compare_methods(measurement, ["absmax", "absmax", "percentile:99.9"])}
    assert list(rows) == ["absmax", "percentile:99.9", "dynamic per-token", "float8 e4m3"]
    absmax = rows["absmax"]
    assert (absmax.tensors, absmax.too_coarse, absmax.worst_tensor) == (2, 1, "b.fc:input")
    bodies = [absmax.errors[name].body_sqnr_db for name in ("a.fc:input", "b.fc:input")]
    assert absmax.worst_body_sqnr_db == min(bodies)  # type: ignore[type-var]
    assert absmax.median_body_sqnr_db == pytest.approx(sum(bodies) / 2)  # type: ignore[arg-type]
    assert absmax.worst_clipped == 0 < rows["percentile:99.9"].worst_clipped
    assert rows["dynamic per-token"].estimated
    assert rows["dynamic per-token"].too_coarse == 0


def test_choosing_scales_loads_no_pytorch() -> None:
    code = "import sys, calib.scales; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
