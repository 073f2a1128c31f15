# SPDX-License-Identifier: Apache-2.0
"""Encoders, decoders and caches: every tensor belongs to the tokens that it was made of."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import tiny_models
from calib.measurement import Calibration, Site
from calib.statistics import SINK

ENCODER_DECODERS = [
    ("BartForConditionalGeneration", "bart"),
    ("T5ForConditionalGeneration", "t5"),
    ("MarianMTModel", "marian"),
]
INLINE = [
    ("FalconForCausalLM", "falcon"),
    ("GPTJForCausalLM", "gptj"),
    ("BloomForCausalLM", "bloom"),
    ("MptForCausalLM", "mpt"),
    ("CodeGenForCausalLM", "codegen"),
]
# what a decoder reads of the encoder, and what is the decoder's own
CROSS = re.compile(r"(encoder_attn|EncDecAttention)(\.[kv](_proj)?:(input|output)|:(key|value))")
DECODER = re.compile(r"(^|\.)decoder\.|^lm_head")


def by_name(calibration: Calibration) -> dict[str, Site]:
    return {name: site for site in calibration.sites().values() for name in (site.name, *site.aliases)}


def top(site: Site) -> tuple[int, int, int, float]:
    peaks = site.statistics.peaks
    assert peaks is not None
    return int(peaks.document[0]), int(peaks.position[0]), int(peaks.token_id[0]), float(peaks.value[0])


@pytest.mark.parametrize(("class_name", "model_type"), ENCODER_DECODERS)
@pytest.mark.parametrize("tokens", [9, 12])
def test_decoder_tensors_belong_to_decoder_tokens(class_name: str, model_type: str, tokens: int) -> None:
    """Also where both have equally many tokens, and with padding on both sides."""
    model = tiny_models.build(class_name, model_type)
    ids, decoder = torch.randint(3, 60, (2, 12)), torch.randint(60, 119, (2, tokens))
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(decoder)
    mask[0, 7:] = 0
    with torch.no_grad(), Calibration(model) as calibration:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder, decoder_attention_mask=decoder_mask)
    sides = {"encoder": (ids, int(mask.sum())), "decoder": (decoder, int(decoder_mask.sum()))}
    crossed = 0
    for name, site in by_name(calibration).items():
        memory = CROSS.search(name) is not None
        crossed += memory
        of, count = sides["decoder" if not memory and DECODER.search(name) else "encoder"]
        assert site.statistics.range.count_all == count * site.channels, name
        document, position, token, _ = top(site)
        assert int(of[document, position]) == token, name
    assert crossed >= 8


@pytest.mark.parametrize(("class_name", "model_type"), INLINE)
def test_inline_attention_shows_keys_and_values_on_their_way_into_the_cache(class_name: str, model_type: str) -> None:
    from transformers import DynamicCache

    model = tiny_models.build(class_name, model_type)
    ids = torch.randint(3, 119, (2, 12))
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        model(ids, past_key_values=cache, use_cache=True)
        with Calibration(model, keep_cache=False) as calibration:
            measured = model(ids, use_cache=True).logits
    assert torch.equal(measured, plain)
    found = (
        [s for s in calibration.sites().values() if "key" in s.kinds],
        [s for s in calibration.sites().values() if "value" in s.kinds],
    )
    for sites, part in zip(found, ("keys", "values"), strict=True):
        assert len(sites) == len(cache.layers) == 2
        for site, layer in zip(sites, cache.layers, strict=True):
            held = getattr(layer, part)
            assert (site.statistics.range.min, site.statistics.range.max) == (held.min().item(), held.max().item())
            assert site.channels == held.shape[1] * held.shape[3]
            assert site.heads == held.shape[1]
            assert site.head_amax is not None
            assert site.head_amax.tolist() == held.abs().amax(dim=(0, 2, 3)).tolist()


def test_latent_attention_shows_what_it_keeps_and_what_it_attends_to() -> None:
    from transformers import DynamicCache

    model = tiny_models.build("DeepseekV3ForCausalLM", "deepseek_v3")
    ids = torch.randint(3, 119, (2, 12))
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    with torch.no_grad(), Calibration(model) as calibration:
        model(ids, past_key_values=cache, use_cache=True)
    sites = by_name(calibration)
    for index, layer in enumerate(cache.layers):
        for part, held in (("cache_key", layer.keys), ("cache_value", layer.values)):
            span = sites[f"model.layers.{index}.self_attn:{part}"].statistics.range
            assert (span.min, span.max) == (held.min().item(), held.max().item())
        assert sites[f"model.layers.{index}.self_attn:key"].heads == 4


def test_a_layer_whose_keys_are_never_seen_closes_the_gate_by_name() -> None:
    model = tiny_models.build("LlamaForCausalLM", "llama")
    attention: Any = model.get_submodule("model.layers.1.self_attn")

    def inline(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        attention.k_proj(hidden_states)
        attention.q_proj(hidden_states)
        return attention.o_proj(attention.v_proj(hidden_states).repeat(1, 1, 2)), None

    attention.forward = inline
    with torch.no_grad(), Calibration(model) as calibration:
        model(torch.randint(3, 119, (2, 12)))
    (gate,) = (g for g in calibration.gates() if g.name == "every_site_fired")
    assert not gate.passed
    assert "model.layers.1.self_attn:key" in gate.detail
    assert set(gate.names) == {f"model.layers.1.self_attn:{part}" for part in ("query", "key", "value")}


def test_generated_tokens_keep_their_positions_and_are_no_sinks() -> None:
    model = tiny_models.build("LlamaForCausalLM", "llama")
    ids = torch.randint(3, 119, (2, 6))
    with torch.no_grad(), Calibration(model) as calibration:
        out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, min_new_tokens=5)
    site = by_name(calibration)["model.layers.0.input_layernorm:input"]
    span, peaks = site.statistics.range, site.statistics.peaks
    assert span.count_all == 2 * 10 * site.channels  # the last token is never read
    assert span.count[SINK] == 2 * 4 * site.channels
    assert peaks is not None
    assert int(peaks.position.max()) == 9
    new = peaks.position >= 6
    assert new.any()
    rows = peaks.document[new] % 2
    assert (out.numpy()[rows, peaks.position[new]] == peaks.token_id[new]).all()


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_what_fired_in_the_probe_alone_is_missing() -> None:
    model = nn.ModuleDict({"always": Text(), "rare": Text()})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
            y = self.parts["always"](x)
            return self.parts["rare"](y) if rare else y

    both = Both()
    with torch.no_grad(), Calibration(both) as calibration:
        with calibration.probe():
            both(torch.randn(1, 4), rare=True)
        both(torch.randn(2, 4))
    (gate,) = (g for g in calibration.gates() if g.name == "every_site_fired")
    assert not gate.passed
    assert set(gate.names) == {"parts.rare.linear:output"}  # its input is the output of the other


def test_late_readers_of_a_known_tensor_are_its_aliases() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, late: bool = False) -> torch.Tensor:
            y = self.first(x)
            return self.second(y) + self.third(y) if late else y

    model, x = Late(), torch.randn(3, 4)
    with torch.no_grad(), Calibration(model) as calibration:
        model(x)
        model(x, late=True)
        model(x, late=True)
    sites = calibration.sites()
    assert set(sites) == {"first:input", "first:output", "second:output", "third:output"}
    assert set(sites["first:output"].aliases) == {"second:input", "third:input"}
    assert sites["first:output"].statistics.range.count_all == 36
    assert sites["third:output"].statistics.range.count_all == 24


def test_two_elements_of_what_a_module_returns_are_two_sites() -> None:
    from calib.sites import Port

    one, two = Port("m", "output", "residual", 0), Port("m", "output", "router", 0, index=1)
    assert (one.name, two.name) == ("m:output", "m:output.1")


def test_measuring_is_in_evaluation_mode_and_leaves_the_mode_as_it_was(llama: Any, blocks: Any) -> None:
    from calib.measurement import MeasureOptions, measure

    options = MeasureOptions(batch_size=2, weights=False)
    expected = measure(llama, blocks, options).sha256
    llama.model.model.layers[0].train()
    try:
        assert measure(llama, blocks, options).sha256 == expected
        assert llama.model.model.layers[0].training
        assert not llama.model.model.layers[1].training
    finally:
        llama.model.eval()


def test_documents_of_a_decoder_are_those_of_its_rows() -> None:
    model = tiny_models.build("BartForConditionalGeneration", "bart")
    with torch.no_grad(), Calibration(model) as calibration:
        calibration.annotate(document=np.array([7, 3]))
        model(input_ids=torch.randint(3, 60, (2, 12)), decoder_input_ids=torch.randint(3, 60, (2, 5)))
    for site in calibration.sites().values():
        assert site.statistics.documents.document.tolist() == [3, 7], site.name


def test_continuations_are_measured_beside_the_blocks(llama: Any, blocks: Any) -> None:
    from dataclasses import replace

    from calib.measurement import MeasureOptions, measure

    options = MeasureOptions(batch_size=2, weights=False)
    plain, longer = measure(llama, blocks, options), measure(llama, blocks, replace(options, generate=3))
    rows, length = blocks.input_ids.shape
    for name, site in longer.sites.items():
        if name.startswith("lm_head"):
            continue
        count = site.statistics.range.count
        assert count.sum() == rows * (length + 2) * site.channels, name  # the last token is chosen, not read
        assert count[SINK] == plain.sites[name].statistics.range.count[SINK]
        assert site.statistics.documents.document.tolist() == plain.sites[name].statistics.documents.document.tolist()
        assert site.statistics.range.amax >= plain.sites[name].statistics.range.amax
    assert longer.run.generate == 3
    assert longer.passed
