# SPDX-License-Identifier: Apache-2.0
"""Grids that reach as far as the text of the search, where one rare event in more text would take their levels away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.cures import save_smoothing
from calib.cures.clip import Clip
from calib.cures.restore import SMOOTHING_FILE, restore_cures
from calib.cures.result import Cured, CureOptions
from calib.cures.search import find_cure
from calib.cures.trials import SEARCH_ROWS
from calib.measurement import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.statistics import REST
from tests.cures.models import spiked
from tests.cures.test_search import rows_file

RARE, PLACE, WHERE = 299, (9, 20), "model.layers.1.mlp.down_proj:input"
"""A token, the row and position where alone it is, and the tensor in which it makes a peak."""


def planted(model: torch.nn.Module, effect: float) -> None:
    """One neuron of the second layer that fires for one token only, and writes `effect` times its activation."""
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[RARE] = 0
        model.model.embed_tokens.weight[RARE, 0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        mlp.gate_proj.weight[5], mlp.up_proj.weight[5] = 0, 0
        mlp.gate_proj.weight[5, 0], mlp.up_proj.weight[5, 0] = 4, 4
        mlp.down_proj.weight[:, 5] *= effect


def text_of(opened: OpenedModel, folder: Path) -> TokenBlocks:
    """Twelve rows for ranges, of which the tenth has the token, and eight held out."""
    rows = np.random.default_rng(0).integers(5, RARE, (20, 32))
    rows[PLACE] = RARE
    return build_blocks([rows_file(folder, rows.tolist())], opened.tokenizer, samples=20, max_length=32)


def found(tiny_llama: Path, folder: Path, effect: float, cures: tuple[str, ...] = ()) -> tuple[OpenedModel, Cured]:
    opened = open_model(tiny_llama, device="cpu")
    planted(opened.model, effect)
    if cures:
        spiked(opened.model)
    blocks = text_of(opened, folder)
    rare = np.flatnonzero((blocks.input_ids == RARE).any(1))
    order = [*np.setdiff1d(np.arange(20), rare)[:SEARCH_ROWS], *rare]
    order += list(np.setdiff1d(np.arange(20), order))
    ranges, held_out = blocks.select(order[:12]), blocks.select(order[12:])
    few = measure(opened, ranges.select(range(SEARCH_ROWS)), MeasureOptions(batch_size=4))
    return opened, find_cure(opened, few, ranges, held_out, CureOptions(cures=cures, target=1.0))


def test_a_peak_that_the_model_does_not_need_is_clipped(tiny_llama: Path, tmp_path: Path) -> None:
    _, cured = found(tiny_llama, tmp_path, effect=0.0)
    tensor = cured.scales.tensors[WHERE]
    assert tensor.amax > 10 * tensor.range_max  # what was seen, and what is represented
    assert tensor.expected.clipped is not None
    assert 0 < tensor.expected.clipped < 1e-3
    assert cured.candidate.name == "clip"
    (record,) = cured.scales.cures
    assert record.kind == "clip"
    assert record.settings["blocks"] == SEARCH_ROWS
    assert WHERE in record.settings["tensors"]  # type: ignore[operator]
    scheme = cured.plan.inputs[WHERE.removesuffix(":input")]
    assert float(scheme.scale) == pytest.approx(tensor.range_max / 127.5, rel=1e-5)  # type: ignore[union-attr, arg-type]


def test_a_peak_that_carries_what_the_model_needs_is_not(tiny_llama: Path, tmp_path: Path) -> None:
    _, cured = found(tiny_llama, tmp_path, effect=3.0)
    assert cured.scales.cures == []
    assert cured.scales.tensors[WHERE].range_max == pytest.approx(cured.scales.tensors[WHERE].amax)
    assert "text that is clipped loses by it" in cured.skipped["clip"]


def test_a_clip_leaves_the_fingerprint_of_the_cured_model_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    _, cured = found(tiny_llama, tmp_path, effect=0.0, cures=("smooth",))
    assert [record.kind for record in cured.scales.cures] == ["smooth", "clip"]
    assert cured.candidate.smoothing is not None
    save_smoothing(cured.candidate.smoothing, tmp_path / SMOOTHING_FILE)
    again = open_model(tiny_llama, device="cpu")
    planted(again.model, 0.0)
    spiked(again.model)
    restored = restore_cures(again, cured.scales, tmp_path)
    assert restored.provenance.fingerprint == cured.scales.model.fingerprint
    torch.testing.assert_close(again.model.state_dict(), cured.opened.model.state_dict())


def test_limits_are_the_ranges_of_less_text_and_rows_are_found_by_their_peaks(tiny_llama: Path, tmp_path: Path) -> None:
    opened = open_model(tiny_llama, device="cpu")
    planted(opened.model, 0.0)
    blocks = text_of(opened, tmp_path)
    rare = int(np.flatnonzero((blocks.input_ids == RARE).any(1))[0])
    others = blocks.select(np.setdiff1d(np.arange(20), [rare]))
    searched = measure(opened, others.select(range(8)), MeasureOptions(batch_size=4))
    measured = measure(opened, blocks, MeasureOptions(batch_size=4))
    assert Clip.to(measured, measured, include_sink=True) is None
    clip = Clip.to(searched, measured, include_sink=False)
    assert clip is not None
    part = searched.sites[WHERE].statistics.range.of(REST)
    assert clip.limits[WHERE] == (part.min, part.max)
    assert max(clip.growth, key=lambda name: clip.growth[name]) == WHERE
    assert (clip.blocks, clip.all_blocks) == (8, 20)
    assert list(clip.most_affected(measured, blocks, 0, 1)) == [rare]
    with_prefix = measure(opened, blocks.with_prefix([7, 8]), MeasureOptions(batch_size=4, sink_positions=2))
    assert list(clip.most_affected(with_prefix, blocks, 2, 1)) == [rare]
