# SPDX-License-Identifier: Apache-2.0
"""M, its site and the massive tokens of a measured model, against hooks that know nothing of calib."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.errors import ArtifactError, GateError, UsageError
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure, resume
from calib.models import OpenedModel, open_model
from calib.protocols.massive_tokens import massive_tokens
from calib.protocols.max_activations import compare_maxima, measured_rows, missing_sites, protocol_dtype
from calib.protocols.paper_sites import MAXIMUM_KINDS, PaperSite, paper_sites
from calib.protocols.rows import CheckpointMaximum
from tests.protocols.naive import Naive, naive_protocol

Run = tuple[OpenedModel, TokenBlocks, Measurement]


def assert_equal_to_naive(measurement: Measurement, naive: dict[str, Naive]) -> None:
    rows = {row.site.name: row for row in measured_rows(measurement)}
    assert rows.keys() == naive.keys()
    for name, row in rows.items():
        values = naive[name].values
        assert (row.min, row.max) == (values.min().item(), values.max().item()), name
        assert row.count == values.numel(), name
        wide = values.double()
        assert row.mean == pytest.approx(wide.mean().item(), rel=1e-6, abs=1e-12), name
        assert row.rms == pytest.approx(wide.square().mean().sqrt().item(), rel=1e-9), name
        assert row.std == pytest.approx(wide.std(correction=0).item(), rel=1e-6), name
        assert row.abs_mean == pytest.approx(wide.abs().mean().item(), rel=1e-9), name
        if row.site.kind in MAXIMUM_KINDS:
            assert row.massive_tokens == naive[name].massive, name
            ordered = values.abs().flatten().sort().values
            assert row.abs_q999 == ordered[-(-999 * len(ordered) // 1000) - 1].item(), name
    five = {n: v.values for n, v in naive.items() if PaperSite.parse(n).kind in MAXIMUM_KINDS}
    top = compare_maxima(measurement).measured
    assert top.magnitude == max(v.abs().max().item() for v in five.values())
    assert top.value in (five[top.site].max().item(), five[top.site].min().item())


@pytest.mark.parametrize("layout", ["blocks", "documents"])
def test_the_five_kinds_and_massive_tokens_equal_naive_hooks(
    massive_llama: Path, protocol_run: Callable[..., Run], layout: str
) -> None:
    opened, blocks, measurement = protocol_run(massive_llama, layout=layout)
    if layout == "documents":
        assert len(set(blocks.lengths)) > 1  # so there is padding, which must not count
    assert opened.provenance.dtype == "bfloat16"
    naive = naive_protocol(opened, blocks, 4)
    assert 0 < naive["layer_1_hidden"].massive < len(naive["layer_1_hidden"].values)
    assert_equal_to_naive(measurement, naive)


def test_float32_models_are_tested_on_float32_values(massive_llama: Path, protocol_run: Callable[..., Run]) -> None:
    opened, blocks, measurement = protocol_run(massive_llama, dtype="float32")
    naive = naive_protocol(opened, blocks, 4)
    found = {row.site.name: row.massive_tokens for row in measured_rows(measurement)}
    assert found["layer_1_hidden"] == naive["layer_1_hidden"].massive > 0


@pytest.mark.slow
def test_smollm2_against_naive_hooks(smollm2: Path) -> None:
    opened = open_model(smollm2, device="cpu", dtype="bfloat16")
    blocks = build_blocks([], opened.tokenizer, samples=4, max_length=128)
    options = MeasureOptions(batch_size=2, weights=False, protocol="max-activations")
    measurement = measure(opened, blocks, options, around=massive_tokens)
    naive = naive_protocol(opened, blocks, 2)
    assert len(naive) == 4 * 30 + 2
    assert_equal_to_naive(measurement, naive)
    comparison = compare_maxima(measurement)
    assert comparison.missing == []
    assert comparison.measured.site == "layer_11_mlp_output"  # equal to that of layer_11_hidden, and before it
    assert comparison.measured.by_kind["hidden"] == comparison.measured.magnitude
    assert 20_000 < comparison.measured.magnitude < 30_000


def test_shards_and_resumed_runs_equal_one_run(massive_run: Run) -> None:
    opened, blocks, whole = massive_run
    options = MeasureOptions(batch_size=4, protocol="max-activations")
    parts = [measure(opened, blocks, replace(options, shard=(i, 2)), around=massive_tokens) for i in (0, 1)]
    assert parts[1].merge(parts[0]).sha256 == whole.sha256
    assert resume(opened, blocks, parts[0], options, around=massive_tokens).sha256 == whole.sha256


def test_massive_tokens_survive_the_measurement_file(massive_run: Run, tmp_path: Path) -> None:
    whole = massive_run[2]
    whole.save(tmp_path / "m")
    assert compare_maxima(Measurement.load(tmp_path / "m")) == compare_maxima(whole)


def test_hooks_are_gone_after_a_run_and_after_an_error(massive_llama: Path) -> None:
    from calib.measurement import Calibration

    model = open_model(massive_llama, device="cpu").model
    calibration = Calibration(model)
    with pytest.raises(RuntimeError, match="stop"), calibration, massive_tokens(calibration):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_pass_that_broke_off_adds_no_tokens(massive_llama: Path) -> None:
    from calib.measurement import Calibration

    model = open_model(massive_llama, device="cpu").model
    calibration = Calibration(model)
    ids = torch.arange(10).reshape(1, 10)
    with torch.no_grad(), calibration, massive_tokens(calibration):
        model(input_ids=ids)
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broke")))
        with pytest.raises(ValueError, match="broke"):
            model(input_ids=ids)
        handle.remove()
        model(input_ids=ids)
    ratios = calibration.sites()["model.embed_tokens:output"].statistics.ratios
    assert ratios is not None
    assert ratios.tokens.sum() == 20


def test_gpt2_is_named_like_a_llama(tiny_gpt2: Path, protocol_run: Callable[..., Run]) -> None:
    named = paper_sites(protocol_run(tiny_gpt2, dtype="float32")[2])
    assert [site.name for site in named] == [
        "embedding_output",
        *(f"layer_{i}_{kind}" for i in (0, 1) for kind in ("attn_output", "mlp_output", "hidden")),
        "final_layernorm",
    ]


def test_a_model_without_a_final_norm_says_so(tiny_bert: Path, protocol_run: Callable[..., Run]) -> None:
    assert compare_maxima(protocol_run(tiny_bert, dtype="float32")[2]).missing == ["final_layernorm"]


def test_missing_kinds_are_named() -> None:
    sites = [PaperSite("embedding_output"), PaperSite("hidden", 0), PaperSite("attn_output", 0), PaperSite("hidden", 1)]
    assert missing_sites(sites) == [
        "layer_0_mlp_output",
        "layer_1_attn_output",
        "layer_1_mlp_output",
        "final_layernorm",
    ]


def test_a_measurement_without_blocks_has_no_maximum(massive_run: Run) -> None:
    opened, blocks, _ = massive_run
    partial = measure(opened, blocks, MeasureOptions(batch_size=4, sites=["embedding"], weights=False))
    with pytest.raises(GateError, match="--sites"):
        compare_maxima(partial)


def test_ranges_alone_are_refused(massive_run: Run) -> None:
    opened, blocks, _ = massive_run
    ranges = measure(opened, blocks, MeasureOptions(batch_size=4, statistics="ranges", weights=False))
    with pytest.raises(UsageError, match="ranges"):
        compare_maxima(ranges)


def test_equal_magnitudes_are_named_by_the_first_site_of_a_forward_pass(massive_run: Run) -> None:
    rows = measured_rows(massive_run[2])
    top = max((row for row in rows if row.site.kind in MAXIMUM_KINDS), key=lambda row: row.amax)
    tied = [replace(row, min=top.min, max=top.max) if row.site.kind == "hidden" else row for row in reversed(rows)]
    assert CheckpointMaximum.of(tied).site == "layer_0_hidden"


def test_nan_in_a_file_is_not_taken_for_a_maximum(massive_run: Run) -> None:
    rows = [replace(row, max=float("nan")) for row in measured_rows(massive_run[2])]
    with pytest.raises(ArtifactError, match="NaN"):
        CheckpointMaximum.of(rows)
    with pytest.raises(ArtifactError, match="five kinds"):
        CheckpointMaximum.of([])


def test_rank_counts_larger_maxima() -> None:
    from calib.protocols.max_activations import Comparison
    from calib.protocols.published import published_maxima

    known = published_maxima()
    one = replace(known[0], checkpoint="mine", value=-8000.0)
    comparison = Comparison(one, known, [])
    assert comparison.rank == 17
    assert comparison.ranked[16] is one


def test_options_that_contradict_the_protocol() -> None:
    plain = {"add_bos": False, "chat_template": False, "statistics": "full", "dtype": "auto"}
    assert protocol_dtype(**plain) == "bfloat16"  # type: ignore[arg-type]
    assert protocol_dtype(**{**plain, "dtype": "float32"}) == "float32"  # type: ignore[arg-type]
    for option, value in (("add_bos", True), ("chat_template", True), ("statistics", "ranges")):
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
            protocol_dtype(**{**plain, option: value})  # type: ignore[arg-type]
