# SPDX-License-Identifier: Apache-2.0
"""Rotating the input of layers keeps a model's function; reverting puts the very bits back and takes the hooks away."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from calib import QuantizationPlan, QuantizedModel
from calib.cures import InputRotation, OnlineRotation, find_pairs
from calib.errors import ModelError, UsageError
from calib.quantized.grid import IntegerGrid
from calib.quantized.quantizers import DynamicQuantizer
from calib.schema.scales import CureRecord
from tests.cures.models import build, logits, pairs_of
from tests.cures.test_fold import bits, random_smoothing, same_bits

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def unhooked(model: Any) -> bool:
    return not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def seen_by(model: Any, name: str) -> torch.Tensor:
    """What a hook that is registered now sees of a module's input."""
    kept: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    logits(model)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt2", "bert", "phi3", "opt", "albert", "t5"])
@pytest.mark.parametrize("seed", [None, 3])
def test_rotated_inputs_keep_the_logits(name: str, seed: int | None) -> None:
    model = build(name)
    expected, before = logits(model), bits(model)
    rotation = OnlineRotation.by_role(model, ("mlp_output", "attention_output"), signs_seed=seed)
    rotated = rotation.apply(model)
    assert set(rotated.names) == {f"{module}.weight" for module in rotation.modules}
    assert all(not torch.equal(before[n], model.get_parameter(n)) for n in rotated.names)
    assert relative(logits(model), expected) < 1e-4
    assert rotated.silent() == []
    rotated.revert()
    assert same_bits(model, before)
    assert unhooked(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_roles_name_the_layers_that_lead_back_to_the_residual_stream() -> None:
    assert OnlineRotation.by_role(build("llama")).modules == (
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    )
    assert OnlineRotation.by_role(build("gpt2")).modules == ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")


def test_a_model_without_the_role_is_told_so() -> None:
    with pytest.raises(UsageError, match="no linear layer of MixtralForCausalLM has this role; name layers"):
        OnlineRotation.by_role(build("mixtral"))


def test_the_input_is_the_written_formula() -> None:
    """Signs from SHAKE-256, then the sum over each block with the parity of the common bits as its sign."""
    model = build("llama")
    name = "model.layers.1.mlp.down_proj"
    plain = seen_by(model, name).double()
    with OnlineRotation((name,), block=16, signs_seed=9).apply(model):
        result = seen_by(model, name).double()
    stream = hashlib.shake_256(b"9").digest(12)
    expected = torch.zeros_like(plain)
    for i in range(96):
        for j in range(i // 16 * 16, i // 16 * 16 + 16):
            negative = (stream[j // 8] >> j % 8 & 1) + (i & j & 15).bit_count()
            expected[..., i] += (-1) ** negative * plain[..., j] / 4
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_lone_peak_spreads_over_its_block_and_no_further() -> None:
    x = torch.zeros(2, 1536)
    x[:, 600] = 100.0
    rotation = InputRotation(1536)
    assert rotation.block == 512
    result = rotation.rotate(x)
    torch.testing.assert_close(result[:, 512:1024].abs(), torch.full((2, 512), 100 / 512**0.5))
    assert not result[:, :512].any()
    assert not result[:, 1024:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_rotated_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    weight = model.model.layers[0].mlp.down_proj.weight
    expected = InputRotation(96, signs_seed=1).rotate(weight.detach().float()).to(dtype)
    with OnlineRotation(("model.layers.0.mlp.down_proj",), signs_seed=1).apply(model):
        assert torch.equal(weight, expected)
        assert seen_by(model, "model.layers.0.mlp.down_proj").dtype == dtype


def test_modules_that_read_one_tensor_get_one_rotated_tensor() -> None:
    model = build("llama")
    names = [f"model.layers.0.{name}" for name in ATTENTION[:3]]
    seen: list[torch.Tensor] = []
    expected = logits(model)
    with OnlineRotation(tuple(names)).apply(model):
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        assert relative(logits(model), expected) < 1e-4
    assert seen[0] is seen[1] is seen[2]


def test_the_hooks_go_and_the_bits_return_on_an_error() -> None:
    model = build("llama")
    before = bits(model)

    def broken() -> None:
        with OnlineRotation.by_role(model).apply(model):
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        broken()
    assert same_bits(model, before)
    assert unhooked(model)


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "opt"])
@pytest.mark.parametrize("rotation_first", [True, False])
def test_it_composes_with_smoothing_in_both_orders(name: str, rotation_first: bool) -> None:
    model = build(name)
    expected, before = logits(model), bits(model)
    rotation = OnlineRotation.by_role(model, ("mlp_output", "attention_output"), signs_seed=2)
    cures = [rotation, random_smoothing(pairs_of(name))]
    first, second = [cure.apply(model) for cure in (cures if rotation_first else cures[::-1])]
    assert relative(logits(model), expected) < 1e-4
    with pytest.raises(ModelError, match="revert the later cure first"):
        first.revert()
    assert unhooked(model) is False
    second.revert()
    first.revert()
    assert same_bits(model, before)
    assert unhooked(model)


def test_a_norm_can_be_smoothed_before_rotated_readers() -> None:
    model = build("llama")
    expected = logits(model)
    names = tuple(f"model.layers.{i}.{name}" for i in range(2) for name in ATTENTION)
    with OnlineRotation(names, signs_seed=4).apply(model), random_smoothing(pairs_of("llama")).apply(model):
        assert relative(logits(model), expected) < 1e-4


def test_no_pair_is_found_behind_a_rotation() -> None:
    model = build("llama")
    with OnlineRotation.by_role(model).apply(model) as rotated:
        pairs = find_pairs(model)
        assert "rotated as it arrives" in pairs.skipped["model.layers.0.mlp.down_proj"]
        assert not {c.module for pair in pairs for c in pair.consumers} & set(rotated.rotations)
    assert len(pairs) == len(pairs_of("llama")) - 2


def test_a_quantized_model_rounds_what_is_rotated() -> None:
    model = build("llama")
    name = "model.layers.0.mlp.down_proj"
    quantizer = DynamicQuantizer(IntegerGrid.of(8))
    plan = QuantizationPlan(inputs={name: quantizer})
    with OnlineRotation((name,)).apply(model):
        rotated = seen_by(model, name)
        with QuantizedModel(model, plan):
            assert torch.equal(seen_by(model, name), quantizer(rotated))


def test_a_second_rotation_of_a_layer_is_refused() -> None:
    model = build("llama")
    rotation = OnlineRotation.by_role(model)
    with rotation.apply(model), pytest.raises(UsageError, match=r"down_proj: its input is rotated already"):
        rotation.apply(model)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("model.layers.7.mlp.down_proj",), "is no module of LlamaForCausalLM"),
        (("model.norm",), "is a LlamaRMSNorm, no linear layer"),
        (("lm_head",), "its weight is tied to model.embed_tokens"),
    ],
)
def test_what_cannot_be_rotated_is_refused_and_nothing_changes(modules: tuple[str, ...], message: str) -> None:
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    before = bits(model)
    with pytest.raises((UsageError, ModelError), match=message):
        OnlineRotation(("model.layers.0.mlp.down_proj", *modules)).apply(model)
    assert same_bits(model, before)
    assert unhooked(model)


@pytest.mark.parametrize(
    ("width", "block", "message"), [(7, 512, "is odd"), (64, 48, "no power of two"), (64, 1, "above 1")]
)
def test_a_block_that_cannot_be_is_refused(width: int, block: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InputRotation(width, block)


def test_the_record_says_what_a_consumer_must_do() -> None:
    rotation = OnlineRotation(("a.down", "b.down"), block=256, signs_seed=11)
    record = rotation.record()
    assert CureRecord.model_validate_json(record.model_dump_json()) == record
    assert (record.kind, record.needs) == ("rotate", "online-op")
    assert record.settings["modules"] == ["a.down", "b.down"]
    assert (record.settings["largest_block"], record.settings["signs_seed"]) == (256, 11)
