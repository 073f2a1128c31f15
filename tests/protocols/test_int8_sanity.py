# SPDX-License-Identifier: Apache-2.0
"""The INT8 check, against the paper's loop over real tensors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.corpus import TokenBlocks
from calib.errors import ArtifactError, UsageError
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel
from calib.protocols.int8_sanity import int8_sanity, linear_quantile, write_sanity
from calib.protocols.max_activations import compare_maxima
from calib.protocols.published import SanityRow, published_sanity
from calib.scales import Distribution
from calib.statistics import FloatHistogram, Observation, Range
from tests.protocols.naive import naive_protocol

Run = tuple[OpenedModel, TokenBlocks, Measurement]


def naive_metrics(x: torch.Tensor, t: float) -> dict[str, float]:
    """Section 2, pass 3, in float32 as a model would be, with the sums in float64."""
    s = torch.tensor(t / 127, dtype=torch.float32)
    q = (x.clamp(-t, t) / s).round().clamp(-127, 127)
    x, e = x.double(), q.double() * s.double() - x.double()
    return {
        "mae": e.abs().mean().item(),
        "rmse": e.square().mean().sqrt().item(),
        "rel_mae": (e.abs().mean() / x.abs().mean()).item(),
        "rel_rmse": (e.square().mean() / x.square().mean()).sqrt().item(),
        "sqnr_db": (10 * torch.log10(x.square().sum() / e.square().sum())).item(),
        "clip_rate": (x.abs() > t).double().mean().item(),
        "zeroed": ((q == 0) & (x != 0)).double().mean().item(),
    }


def naive_linear_quantile(x: np.ndarray) -> float:
    """Section 2, pass 2."""
    magnitudes = np.abs(x.astype(np.float64)).ravel()
    top = magnitudes.max()
    counts = np.bincount((magnitudes / top * 2047).astype(int), minlength=2048)
    return float(top * int(np.argmax(np.cumsum(counts) >= math.ceil(0.999 * magnitudes.size))) / 2047)


def assert_equals(row: SanityRow, x: torch.Tensor) -> None:
    for name, value in naive_metrics(x, row.threshold).items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-6, abs=1e-12), (row.policy, name)
    assert row.count == x.numel()


def test_all_policies_at_the_peak_equal_the_loop_over_the_tensor(massive_run: Run) -> None:
    opened, blocks, measurement = massive_run
    site = compare_maxima(measurement).measured.site
    x = naive_protocol(opened, blocks, 4)[site].values
    sanity = int8_sanity(measurement)
    assert not sanity.held_out
    rows = {row.policy: row for row in sanity.rows}
    assert {row.site for row in sanity.rows} == {site}
    assert rows["max_abs"].threshold == x.abs().max().item()
    assert rows["max_abs"].clip_rate == 0
    assert rows["clip_q0.999"].threshold == np.quantile(x.abs().numpy(), 0.999, method="inverted_cdf")
    assert 0 < rows["clip_q0.999"].clip_rate <= 0.001
    for row in sanity.rows:
        assert_equals(row, x)


def test_any_site_can_be_asked_for_under_both_names(massive_run: Run) -> None:
    opened, blocks, measurement = massive_run
    naive = naive_protocol(opened, blocks, 4)
    rows = int8_sanity(measurement, ["layer_0_mlp_output", "model.layers.0.mlp.down_proj:output"]).rows
    assert len(rows) == 6
    for first, second in zip(rows[:3], rows[3:], strict=True):
        assert replace(second, site=first.site) == first
        assert_equals(first, naive["layer_0_mlp_output"].values)


def test_thresholds_of_other_rows_clip_what_exceeds_them(massive_run: Run) -> None:
    opened, blocks, _ = massive_run
    options = MeasureOptions(batch_size=4, weights=False)
    first, second = (measure(opened, blocks, replace(options, shard=(i, 2))) for i in (0, 1))
    sanity = int8_sanity(second, ["final_layernorm"], calibration=first)
    assert sanity.held_out
    kept = {row.policy: row for row in sanity.rows}
    own = {row.policy: row for row in int8_sanity(first, ["final_layernorm"]).rows}
    assert kept["max_abs"].threshold == own["max_abs"].threshold
    assert kept["clip_q0.999"].threshold == own["clip_q0.999"].threshold
    x = naive_protocol(opened, blocks, 4)["final_layernorm"].values
    half = x[len(x) // 2 :]
    for row in sanity.rows:
        assert_equals(row, half)
        assert (row.calibration_samples, row.eval_samples) == (4, 4)


@pytest.mark.parametrize("peak", [1.0, 30.0, 3000.0])
def test_the_published_quantile_is_the_edge_of_a_linear_bin(peak: float) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal(100_000).astype(np.float32)).bfloat16().float().numpy()
    x[:40] = peak * np.abs(x).max()
    x[50:90] = 0
    values, context = x.reshape(1, 1, -1), Observation.of_shape(1, 1)
    statistics = FloatHistogram.observe(values, context), Range.observe(values, context)
    distribution = Distribution.of(*statistics, "bfloat16")
    assert linear_quantile(distribution) == naive_linear_quantile(x)
    if peak == 3000:  # as in four of the published models: the lower edge of bin 0 or 1
        assert linear_quantile(distribution) in (0.0, distribution.amax / 2047)


def test_four_published_thresholds_are_that_edge() -> None:
    t: dict[str, dict[str, float]] = {}
    for row in published_sanity():
        t.setdefault(row.checkpoint, {})[row.policy] = row.threshold
    edges = {name for name, one in t.items() if one["clip_q0.999"] == pytest.approx(one["max_abs"] / 2047, rel=1e-5)}
    assert edges == {"Qwen2.5-7B", "Qwen3-30B-A3B", "Qwen3-32B", "Qwen3-8B"}


def test_the_authors_file_holds_thresholds_and_metrics(massive_run: Run, tmp_path: Path) -> None:
    measurement = massive_run[2]
    sanity = int8_sanity(measurement)
    path = write_sanity(measurement, sanity, tmp_path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"{raw['model_name']}_quant_sanity.json"
    site = sanity.maximum.site
    assert raw["selected_layers"] == [site]
    assert raw["layer_policy"] == "peak"
    assert raw["reference_global_max_abs"] == sanity.maximum.magnitude == raw["thresholds"]["max_abs"][site]
    assert [m["policy"] for m in raw["metrics"]] == ["max_abs", "clip_q0.999", "clip_q0.999_linear"][: len(sanity.rows)]
    for metrics, row in zip(raw["metrics"], sanity.rows, strict=True):
        assert {k: metrics[k] for k in ("mae", "rmse", "rel_mae", "rel_rmse", "sqnr_db", "clip_rate")} == {
            k: getattr(row, k) for k in ("mae", "rmse", "rel_mae", "rel_rmse", "sqnr_db", "clip_rate")
        }
    other = write_sanity(measurement, int8_sanity(measurement, ["layer_0_hidden"]), tmp_path)
    assert json.loads(other.read_text(encoding="utf-8"))["layer_policy"] == "listed"


def test_unknown_sites_other_models_and_ranges_are_refused(massive_run: Run) -> None:
    opened, blocks, measurement = massive_run
    with pytest.raises(UsageError, match="layer_77_hidden"):
        int8_sanity(measurement, ["layer_77_hidden"])
    other = replace(measurement, model=measurement.model.model_copy(update={"config_sha256": "1" * 64}))
    with pytest.raises(ArtifactError, match="another model"):
        int8_sanity(measurement, calibration=other)
    ranges = measure(opened, blocks, MeasureOptions(batch_size=4, statistics="ranges", weights=False))
    with pytest.raises(UsageError, match="ranges"):
        int8_sanity(ranges)
