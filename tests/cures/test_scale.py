# SPDX-License-Identifier: Apache-2.0
"""Factors in front of layers keep a model's function, bring loud channels down, and are restored from their record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib import QuantizationPlan, QuantizedModel
from calib.corpus import TokenBlocks, build_blocks
from calib.cures import find_pairs
from calib.cures.candidate import Candidate
from calib.cures.input_scaling import InputScaling
from calib.cures.ranges import scaled_ranges
from calib.cures.rotate import OnlineRotation
from calib.cures.scale import LEAST_FACTOR, OnlineScaling, channel_factors
from calib.errors import ArtifactError, ModelError, UsageError
from calib.measurement import Measurement, MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized.grid import IntegerGrid
from calib.quantized.quantizers import DynamicQuantizer
from calib.schema.scales import CureRecord
from tests.cures.models import build, logits

ATTENTION = [f"self.{name}" for name in ("query", "key", "value")]
SHARED = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
LOUD = 5


def some(model: nn.Module, names: list[str], seed: int = 0) -> OnlineScaling:
    """Factors for layers that read one tensor."""
    width = model.get_submodule(names[0]).weight.shape[0 if "c_" in names[0] else 1]
    factors = np.exp2(-np.random.default_rng(seed).integers(0, 4, width)).astype(np.float32)
    return OnlineScaling(dict.fromkeys(names, factors))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(model: nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def unhooked(model: nn.Module) -> bool:
    return not any(module._forward_pre_hooks for module in model.modules())


QKV = {
    "bert": [f"bert.encoder.layer.0.attention.{name}" for name in ATTENTION],
    "gpt2": ["transformer.h.0.mlp.c_proj"],
    "albert": [f"{SHARED}.{name}" for name in ("query", "key", "value")],
    "opt": ["model.decoder.layers.1.fc2"],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(QKV))
def test_the_function_is_kept_and_powers_of_two_cost_no_bit(name: str) -> None:
    model = build(name)
    expected, before = logits(model), bits(model)
    scaled = some(model, QKV[name]).apply(model)
    assert {n.removesuffix(".weight") for n in scaled.names} == set(QKV[name])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert scaled.silent() == []
    scaled.revert()
    assert same_bits(model, before)
    assert unhooked(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_the_hooks_go_and_the_bits_return_on_an_error() -> None:
    model = build("bert")
    before = bits(model)

    def broken() -> None:
        with some(model, QKV["bert"]).apply(model):
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        broken()
    assert same_bits(model, before)
    assert unhooked(model)


def test_layers_that_read_one_tensor_get_one_product() -> None:
    model = build("bert")
    seen: list[torch.Tensor] = []
    with some(model, QKV["bert"]).apply(model):
        for name in QKV["bert"]:
            model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(model)
    assert seen[0] is seen[1] is seen[2]


def test_a_quantized_model_rounds_what_is_scaled() -> None:
    model = build("bert")
    (name, *_) = QKV["bert"]
    quantizer = DynamicQuantizer(IntegerGrid.of(8), "per-tensor")
    seen: list[torch.Tensor] = []
    with some(model, [name]).apply(model):
        module = model.get_submodule(name)
        with QuantizedModel(model, QuantizationPlan(inputs={name: quantizer})):
            module.register_forward_hook(lambda _, args, output: seen.append(args[0]))
            logits(model)
        module.register_forward_hook(lambda _, args, output: seen.append(args[0]))
        logits(model)
    rounded, *_, scaled = seen
    assert torch.equal(rounded, quantizer(scaled))


def test_only_channels_above_the_quantile_come_down_to_it() -> None:
    amax = np.arange(1, 12, dtype=np.float32)  # the quantile of 0.8 is the 9th value
    factors = channel_factors(amax, 0.8)
    assert (factors[:9] == 1).all()
    np.testing.assert_allclose(factors[9:] * amax[9:], 9, rtol=2**-8)
    assert torch.equal(torch.from_numpy(factors), torch.from_numpy(factors).bfloat16().float())
    mute = np.zeros(20, np.float32)
    assert (channel_factors(mute) == 1).all()
    mute[0] = 3.0
    assert channel_factors(mute)[0] == pytest.approx(LEAST_FACTOR, rel=2**-8)


@pytest.mark.parametrize("values", [[0.5, 0.0], [0.5, float("nan")], [0.5, float("inf")], [0.5, 0.1], [[0.5]]])
def test_factors_that_no_dtype_multiplies_alike_are_refused(values: list[Any]) -> None:
    with pytest.raises(UsageError, match="a positive bfloat16 number for each channel"):
        InputScaling(torch.tensor(values))


@pytest.fixture(scope="module")
def blocks(tiny_bert: Path) -> TokenBlocks:
    tokenizer = open_model(tiny_bert, device="cpu").tokenizer
    return build_blocks(["builtin:speeches"], tokenizer, samples=6, max_length=32)


def planted(folder: Path) -> OpenedModel:
    """A tiny BERT in which one channel of what every layer reads is loud, in norms and in neurons."""
    opened = open_model(folder, device="cpu")
    with torch.no_grad():
        for layer in opened.model.bert.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight[LOUD] = 30.0
            layer.intermediate.dense.bias[LOUD] = 30.0
        opened.model.bert.embeddings.LayerNorm.weight[LOUD] = 30.0
    return opened


@pytest.fixture
def opened(tiny_bert: Path) -> OpenedModel:
    return planted(tiny_bert)


@pytest.fixture
def measurement(opened: OpenedModel, blocks: TokenBlocks) -> Measurement:
    return measure(opened, blocks, MeasureOptions(batch_size=4))


def beyond_smoothing(model: nn.Module) -> list[str]:
    return [name for name in find_pairs(model).skipped if "encoder.layer" in name]


def test_factors_come_from_a_measurement_and_are_those_of_all_readers(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    names = beyond_smoothing(opened.model)
    scaling = OnlineScaling.find(opened.model, measurement, names)
    assert set(scaling.factors) == set(names)
    for name, factors in scaling.factors.items():
        assert factors[LOUD] < 0.5, name
        assert (factors == 1).mean() > 0.85
    of_layer = [scaling.factors[f"bert.encoder.layer.1.attention.{name}"] for name in ATTENTION]
    assert np.array_equal(of_layer[0], of_layer[1])
    assert np.array_equal(of_layer[0], of_layer[2])
    predicted = scaled_ranges(measurement, scaling)
    with scaling.apply(opened.model):
        found = measure(opened, blocks, MeasureOptions(batch_size=4))
    ranges = {reader: site.statistics.range for site in found.sites.values() for reader in (site.name, *site.aliases)}
    for site in predicted.sites.values():
        for reader in (site.name, *site.aliases):
            if reader.removesuffix(":input") in names:
                np.testing.assert_allclose(site.statistics.range.amax, ranges[reader].amax, rtol=1e-4)


def test_a_layer_that_is_called_several_times_has_one_set_of_factors(tmp_path: Path, blocks: TokenBlocks) -> None:
    model = build("albert")
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, device="cpu")
    measurement = measure(opened, replace(blocks, input_ids=blocks.input_ids % 300), MeasureOptions(batch_size=4))
    (name, *_) = QKV["albert"]
    scaling = OnlineScaling.find(opened.model, measurement, QKV["albert"])
    amax = np.zeros(64, np.float32)
    calls = 0
    for site in measurement.sites.values():
        if any(reader.partition("#")[0] == f"{name}:input" for reader in (site.name, *site.aliases)):
            assert site.statistics.channels is not None
            amax, calls = np.maximum(amax, site.statistics.channels.amax), calls + 1
    assert calls == 2
    np.testing.assert_array_equal(scaling.factors[name], channel_factors(amax))


def test_a_candidate_scales_only_what_smoothing_and_rotation_do_not_reach(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    model = opened.model
    pairs = find_pairs(model)
    plain = Candidate(8, False, measurement, measurement)
    scaled = plain.scaled(model, pairs)
    assert scaled is not None
    assert scaled.scaling is not None
    reached = {consumer.module for pair in pairs for consumer in pair.consumers}
    assert reached
    assert not reached & set(scaled.scaling.factors)
    rotation = OnlineRotation(("bert.encoder.layer.0.output.dense",))
    beside = replace(plain, input_rotation=rotation).scaled(model, pairs)
    assert beside is not None
    assert beside.scaling is not None
    assert set(scaled.scaling.factors) - set(beside.scaling.factors) == {*rotation.modules}
    assert (scaled.name, beside.name) == ("scale", "rotate-online + scale")
    ids = torch.from_numpy(blocks.input_ids)
    expected = model(input_ids=ids).logits
    with beside.apply(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_record_holds_every_factor_and_restores_them(opened: OpenedModel, measurement: Measurement) -> None:
    scaling = OnlineScaling.find(opened.model, measurement, beyond_smoothing(opened.model))
    record = scaling.record()
    assert CureRecord.model_validate_json(record.model_dump_json()) == record
    assert (record.kind, record.needs) == ("scale", "online-op")
    restored = OnlineScaling.of(opened.model, CureRecord.model_validate_json(record.model_dump_json()))
    assert restored.factors.keys() == scaling.factors.keys()
    for name, factors in scaling.factors.items():
        np.testing.assert_array_equal(restored.factors[name], factors)
    with pytest.raises(ArtifactError, match="do not fit this model"):
        OnlineScaling.of(build("gpt2"), record)


@pytest.mark.parametrize("settings", [{}, {"where": "input", "factors": 3}, {"where": "output", "factors": {}}])
def test_a_damaged_record_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="its record holds no factors of inputs"):
        OnlineScaling.of(build("bert"), CureRecord(kind="scale", summary="for a test", settings=settings))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bert.encoder.layer.7.output.dense"], "is no module of BertForMaskedLM"),
        (["bert.embeddings.LayerNorm"], "is a LayerNorm, no linear layer"),
        (["cls.predictions.decoder"], "its weight is tied to bert.embeddings.word_embeddings"),
        (["bert.encoder.layer.0.output.dense"], "has 96 inputs here, not 64"),
    ],
)
def test_what_cannot_be_scaled_is_refused_and_nothing_changes(names: list[str], message: str) -> None:
    model = build("bert")
    before = bits(model)
    factors = {**some(model, QKV["bert"]).factors, **dict.fromkeys(names, np.ones(64, np.float32))}
    with pytest.raises((UsageError, ModelError), match=message):
        OnlineScaling(factors).apply(model)
    assert same_bits(model, before)
    assert unhooked(model)


def test_an_input_is_changed_once() -> None:
    model = build("bert")
    scaling = some(model, QKV["bert"])
    with scaling.apply(model):
        with pytest.raises(UsageError, match="its input is scaled already"):
            scaling.apply(model)
        with pytest.raises(UsageError, match="its input is scaled already"):
            OnlineRotation((QKV["bert"][1],)).apply(model)


def test_what_a_measurement_lacks_is_said(opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement) -> None:
    names = beyond_smoothing(opened.model)
    with pytest.raises(UsageError, match=r"quantile 1\.0: not between 0 and 1"):
        OnlineScaling.find(opened.model, measurement, names, quantile=1.0)
    with pytest.raises(ArtifactError, match="the measurement has no input of it"):
        OnlineScaling.find(opened.model, replace(measurement, sites={}), names)
    ranges = measure(opened, blocks, MeasureOptions(batch_size=4, statistics="ranges"))
    with pytest.raises(ArtifactError, match="was measured without channels"):
        OnlineScaling.find(opened.model, ranges, names)
