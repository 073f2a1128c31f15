# SPDX-License-Identifier: Apache-2.0
"""Padding never counts: padded rows measure what the same rows measure alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.measurement import Calibration, Measurement, MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.statistics import SINK


@pytest.fixture(scope="module")
def ragged(llama: OpenedModel, tmp_path_factory: pytest.TempPathFactory) -> TokenBlocks:
    """Documents of different lengths, padded at the right."""
    folder = tmp_path_factory.mktemp("documents")
    for index, length in enumerate((3, 40, 90, 200)):
        (folder / f"{index}.txt").write_text(("The cold whale swam and the sailors watched. " * 9)[:length])
    return build_blocks([str(folder)], llama.tokenizer, samples=4, max_length=64, layout="documents")


def assert_alike(padded: Measurement, alone: Measurement, tokens: int) -> None:
    """Counts and places are equal; values as equal as matrix products of other shapes are."""
    assert padded.sites.keys() == alone.sites.keys()
    for name, site in alone.sites.items():
        one, other = padded.sites[name].statistics, site.statistics
        assert one.range.count.tolist() == other.range.count.tolist(), name
        assert one.range.count_all == tokens * site.channels, name
        for field in ("minimum", "maximum"):
            np.testing.assert_allclose(
                getattr(one.range, field), getattr(other.range, field), rtol=1e-4, atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(one.range.sum_of_squares, other.range.sum_of_squares, rtol=1e-4, err_msg=name)
        assert one.documents.document.tolist() == other.documents.document.tolist()
        np.testing.assert_allclose(one.documents.amax, other.documents.amax, rtol=1e-4, atol=1e-5, err_msg=name)
        assert one.peaks is not None
        assert other.peaks is not None
        assert one.peaks.token_id[0] == other.peaks.token_id[0]
        assert one.histogram is not None
        assert one.histogram.count(SINK) == one.range.count[SINK]


def test_padded_rows_of_a_causal_model_measure_as_they_do_alone(llama: OpenedModel, ragged: TokenBlocks) -> None:
    assert len(set(ragged.lengths.tolist())) == 4
    options = MeasureOptions(batch_size=4, weights=False)
    padded = measure(llama, ragged, options)
    alone = measure(llama, ragged, replace(options, batch_size=1))
    assert_alike(padded, alone, int(ragged.lengths.sum()))


def test_padded_rows_of_a_bidirectional_model_too(tiny_bert: Path, ragged: TokenBlocks) -> None:
    opened = open_model(tiny_bert, device="cpu")
    ids = np.where(np.arange(ragged.input_ids.shape[1]) < ragged.lengths[:, None], ragged.input_ids % 90 + 5, 0)
    blocks = replace(ragged, input_ids=ids)
    options = MeasureOptions(batch_size=4, weights=False)
    padded = measure(opened, blocks, options)
    assert_alike(padded, measure(opened, blocks, replace(options, batch_size=1)), int(blocks.lengths.sum()))


def test_a_mask_of_the_users_own_loop_is_obeyed(llama: OpenedModel) -> None:
    ids = torch.arange(60).reshape(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.no_grad(), Calibration(llama.model) as calibration:
        llama.model(input_ids=ids, attention_mask=mask)
    for name, site in calibration.sites().items():
        assert site.statistics.range.count_all == 41 * site.channels, name
        assert site.statistics.range.count[SINK] == 8 * site.channels, name


def test_a_peak_at_a_padded_position_is_not_seen(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, device="cpu").model

    def plant(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0][1, 20, 3] = 9999.0
        args[0][0, 20, 4] = 7777.0

    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(plant)
    ids = torch.arange(60).reshape(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.no_grad(), Calibration(model) as calibration:
        model(input_ids=ids, attention_mask=mask)
    statistics = calibration.sites()["model.layers.1.mlp.down_proj:input"].statistics
    assert statistics.range.amax == 7777.0
    assert statistics.peaks is not None
    assert (statistics.peaks.document[0], statistics.peaks.position[0]) == (0, 20)


def test_padding_at_the_left_moves_the_sink_positions(llama: OpenedModel) -> None:
    ids = torch.arange(40).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), Calibration(llama.model, sink_positions=2) as calibration:
        llama.model(input_ids=ids, attention_mask=mask)
    site = calibration.sites()["model.embed_tokens:output"]
    embedded = llama.model.get_input_embeddings()(ids)
    sinks = torch.stack([embedded[0, 7:9], embedded[1, :2]])
    assert site.statistics.range.of(SINK).max == sinks.max().item()
    assert site.statistics.range.count.tolist() == [(11 + 18) * 64, 4 * 64]
