# SPDX-License-Identifier: Apache-2.0
"""From a measurement alone: the range after smoothing for any alpha, and the alpha of least expected error."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib import Measurement, build_blocks, measure, open_model
from calib.cures import Pairs, SmoothingSweep, find_pairs
from calib.errors import ArtifactError, UsageError
from calib.measurement import MeasureOptions

ALPHAS = (0.0, 0.5, 0.8, 1.0)


@pytest.fixture(scope="module")
def opened(tiny_llama: Path) -> Any:
    """A tiny llama with two loud channels in each norm and in up_proj."""
    opened = open_model(str(tiny_llama))
    with torch.no_grad():
        for layer in opened.model.model.layers:
            layer.input_layernorm.weight[3] = 40.0
            layer.post_attention_layernorm.weight[5] = 25.0
            layer.mlp.up_proj.weight[7] *= 60.0
    return opened


def measured(opened: Any) -> Measurement:
    blocks = build_blocks(None, opened.tokenizer, samples=6, max_length=48)
    return measure(opened, blocks, MeasureOptions(batch_size=2))


@pytest.fixture(scope="module")
def pairs(opened: Any) -> Pairs:
    return find_pairs(opened.model)


@pytest.fixture(scope="module")
def measurement(opened: Any) -> Measurement:
    return measured(opened)


def input_amax(measurement: Measurement, module: str, *, include_sink: bool = True) -> float:
    for site in measurement.sites.values():
        if f"{module}:input" in (site.name, *site.aliases):
            amax = site.statistics.range.amax if include_sink else site.statistics.range.of(0).amax
            return float(amax)
    raise AssertionError(module)


@pytest.mark.parametrize("include_sink", [True, False])
def test_the_predicted_range_is_the_range_after_smoothing(
    opened: Any, pairs: Pairs, measurement: Measurement, *, include_sink: bool
) -> None:
    sweep = SmoothingSweep(pairs, measurement, include_sink=include_sink)
    predicted = sweep.amax([0.8])
    with sweep.smoothing(0.8).apply(opened.model):
        after = measured(opened)
    assert len(predicted) == 21
    for module, amax in predicted.items():
        assert input_amax(after, module, include_sink=include_sink) == pytest.approx(float(amax[0]), rel=1e-5)
        if "up_proj" in module or "down_proj" in module:
            assert amax[0] < input_amax(measurement, module, include_sink=include_sink) / 2


def test_grouped_heads_take_the_largest_of_the_channels_that_share_a_scale(
    pairs: Pairs, measurement: Measurement
) -> None:
    name = "model.layers.1.self_attn.v_proj"
    number = [pair.name for pair in pairs].index(name)
    site = next(
        s for s in measurement.sites.values() if "model.layers.1.self_attn.o_proj:input" in (s.name, *s.aliases)
    )
    assert site.statistics.channels is not None
    amax = site.statistics.channels.amax.reshape(2, 2, 16).max(1).ravel()
    columns = measurement.weights["model.layers.1.self_attn.o_proj:weight"].statistics.column_amax
    weight = columns.reshape(2, 2, 16).max(1).ravel()
    scales = SmoothingSweep(pairs, measurement).scales(number, [0.5])[0]
    published = np.sqrt(amax / weight)
    np.testing.assert_allclose(scales / scales[0], published / published[0], rtol=1e-5)


def test_a_hundred_settings_take_no_time(pairs: Pairs, measurement: Measurement) -> None:
    sweep = SmoothingSweep(pairs, measurement)
    start = time.process_time()
    amax = sweep.amax(np.linspace(0, 1, 100).tolist())
    assert time.process_time() - start < 3
    assert all(values.shape == (100,) for values in amax.values())


def test_the_best_alpha_is_the_best_of_its_pair(pairs: Pairs, measurement: Measurement) -> None:
    sweep = SmoothingSweep(pairs, measurement)
    errors = sweep.expected_error(ALPHAS)
    best = sweep.best(ALPHAS)
    assert errors.shape == (len(pairs), len(ALPHAS))
    np.testing.assert_array_equal(best.alphas, np.array(ALPHAS)[errors.argmin(1)])


def quantized_error(opened: Any, module: str, inputs: torch.Tensor) -> float:
    """Power of the error of one linear layer in INT8, static per tensor, weights per row."""
    weight = opened.model.get_submodule(module).weight
    step, row = inputs.abs().max() / 127, weight.abs().amax(1, keepdim=True) / 127
    exact = inputs.double() @ weight.T.double()
    coded = (inputs / step).round().double() @ (weight / row).round().T.double() * step * row.T
    return float((exact - coded).square().sum(1).mean())


def test_expected_error_follows_the_real_one(opened: Any, pairs: Pairs, measurement: Measurement) -> None:
    """Within a factor 2 at each alpha, for a tensor with a loud channel."""
    pair = pairs["model.layers.1.mlp.up_proj"]
    sweep = SmoothingSweep([pair], measurement)
    expected = sweep.expected_error(ALPHAS)[0]
    blocks = build_blocks(None, opened.tokenizer, samples=6, max_length=48)
    seen: list[torch.Tensor] = []
    layer = opened.model.get_submodule("model.layers.1.mlp.down_proj")
    real = []
    for alpha in ALPHAS:
        seen.clear()
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad(), sweep.smoothing(alpha).apply(opened.model):
            opened.model(input_ids=torch.from_numpy(blocks.input_ids[:, :48]))
            handle.remove()
            real.append(quantized_error(opened, "model.layers.1.mlp.down_proj", seen[0]))
    assert max(real) > 10 * min(real)
    assert np.all(np.abs(np.log(expected / np.array(real))) < np.log(2))


def test_an_alpha_per_pair_is_needed_for_every_pair(pairs: Pairs, measurement: Measurement) -> None:
    sweep = SmoothingSweep(pairs, measurement)
    alphas = {pair.name: 0.1 * i / len(pairs) for i, pair in enumerate(pairs)}
    assert sweep.smoothing(alphas).alphas == tuple(alphas.values())
    alphas.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(UsageError, match=r"none is given for model.layers.1.mlp.up_proj"):
        sweep.smoothing(alphas)


def test_a_measurement_without_the_input_is_refused(pairs: Pairs, opened: Any) -> None:
    blocks = build_blocks(None, opened.tokenizer, samples=2, max_length=16)
    partial = measure(opened, blocks, MeasureOptions(batch_size=2, ignore=("*.down_proj:input",)))
    with pytest.raises(ArtifactError, match="has no input of it; measure linear_input sites"):
        SmoothingSweep(pairs, partial)
