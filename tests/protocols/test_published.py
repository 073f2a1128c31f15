# SPDX-License-Identifier: Apache-2.0
"""The package data against the paper's table, line by line."""

from __future__ import annotations

import gzip
from importlib.resources import files

import pytest

from calib.protocols.paper_sites import PaperSite
from calib.protocols.published import published_maxima, published_rows, published_sanity

# checkpoint, model type, layers, width, M, site, crest, M / q999, massive tokens (None: printed in millions only)
TABLE = [
    ("Qwen2.5-1.5B", "qwen2", 28, 1536, -7968, "layer_5_hidden", 1573, 797, 0),
    ("Qwen2.5-7B", "qwen2", 28, 3584, -13248, "layer_13_hidden", 3019, 1314, 115607),
    ("Qwen2.5-32B", "qwen2", 64, 5120, 30848, "layer_63_hidden", 959, 87, 380731),
    ("Qwen2.5-1.5B-Instruct", "qwen2", 28, 1536, -7968, "layer_5_hidden", 1568, 818, 0),
    ("Qwen2.5-7B-Instruct", "qwen2", 28, 3584, -13312, "layer_13_hidden", 2982, 1356, 115739),
    ("Qwen2.5-32B-Instruct", "qwen2", 64, 5120, 22144, "layer_42_hidden", 2537, 647, 374837),
    ("Qwen2.5-VL-3B", "qwen2_5_vl", 36, 2048, -3984, "layer_30_hidden", 785, 78, 136943),
    ("Qwen2.5-VL-7B", "qwen2_5_vl", 28, 3584, -8256, "layer_13_hidden", 2554, 562, 116080),
    ("Qwen2.5-VL-32B", "qwen2_5_vl", 64, 5120, 22144, "layer_44_hidden", 2548, 532, 303116),
    ("Qwen3-1.7B", "qwen3", 28, 2048, 14208, "layer_25_hidden", 259, 14, 126413),
    ("Qwen3-8B", "qwen3", 36, 4096, 17664, "layer_16_hidden", 3429, 1669, 282549),
    ("Qwen3-32B", "qwen3", 64, 5120, 35328, "layer_44_hidden", 3366, 1272, 530845),
    ("Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 1512, "layer_3_hidden", 3242, 1709, 221828),
    ("Qwen3.5-0.8B", "qwen3_5", 24, 1024, 122, "final_layernorm", 30, 5, 0),
    ("Qwen3.5-9B", "qwen3_5", 32, 4096, 956, "layer_31_hidden", 223, 28, 0),
    ("Qwen3.5-27B", "qwen3_5", 64, 5120, 1848, "layer_63_hidden", 265, 35, 29),
    ("Qwen3.5-35B-A3B", "qwen3_5_moe", 40, 2048, 132, "layer_39_hidden", 288, 37, 0),
    ("gemma-2b", "gemma", 18, 2048, -2992, "layer_11_hidden", 781, 52, 5409),
    ("gemma-2-9b", "gemma2", 42, 3584, 1664, "layer_41_hidden", 120, 30, 7),
    ("gemma-2-27b", "gemma2", 46, 4608, 157696, "layer_38_hidden", 377, 137, None),
    ("gemma-3-4b-it", "gemma3", 34, 2560, 245760, "layer_29_hidden", 187, 143, None),
    ("gemma-3-27b-it", "gemma3", 62, 5376, 696320, "layer_46_hidden", 750, 663, None),
    ("Ling-mini-5T", "bailing_moe", 20, 2048, -7648, "layer_14_hidden", 991, 152, None),
    ("Ling-mini-10T", "bailing_moe", 20, 2048, -9024, "layer_10_hidden", 1385, 364, None),
    ("Ling-mini-15T", "bailing_moe", 20, 2048, -10112, "layer_19_hidden", 158, 36, None),
    ("Ling-mini-20T", "bailing_moe", 20, 2048, -11776, "layer_19_hidden", 169, 43, None),
    ("gpt-oss-20b", "gpt_oss", 24, 2880, -145408, "layer_23_mlp_output", 488, 31, 55000),
]


@pytest.mark.parametrize("expected", TABLE, ids=[row[0] for row in TABLE])
def test_every_published_maximum_is_that_of_the_paper(expected: tuple[object, ...]) -> None:
    one = {m.checkpoint: m for m in published_maxima()}[str(expected[0])]
    assert one.crest is not None
    assert one.over_q999 is not None
    found = (one.checkpoint, one.model_type, one.num_hidden_layers, one.hidden_size, one.value, one.site)
    assert (*found, round(one.crest), round(one.over_q999)) == expected[:8]
    assert expected[8] in (None, one.massive_tokens)


def test_there_are_27_checkpoints_and_four_of_them_overflow_float16() -> None:
    maxima = published_maxima()
    assert len(maxima) == len(TABLE) == 27
    assert {m.checkpoint for m in maxima if m.overflows_float16} == {
        "gemma-2-27b", "gemma-3-4b-it", "gemma-3-27b-it", "gpt-oss-20b"
    }  # fmt: skip
    assert [m.magnitude for m in maxima] == sorted((m.magnitude for m in maxima), reverse=True)


def test_gates_and_routers_are_read_but_do_not_count_for_the_maximum() -> None:
    rows = published_rows()
    assert len(rows) == 4214
    routers = [row for row in rows if row.site.kind == "moe_gate" and row.checkpoint == "Ling-mini-5T"]
    assert max(row.amax for row in routers) == 255  # the index of an expert
    assert all(row.massive_tokens is None for row in routers)
    by_kind = {m.checkpoint: m.by_kind for m in published_maxima()}["Qwen2.5-7B"]
    assert by_kind == pytest.approx(
        {"embedding_output": 1.01, "attn_output": 2736, "mlp_output": 10176, "hidden": 13248, "final_layernorm": 430},
        rel=0.01,
    )


def test_the_published_sanity_check_has_two_policies_for_each_of_eight_checkpoints() -> None:
    rows = published_sanity()
    assert len({row.checkpoint for row in rows}) == 8
    assert len({(row.checkpoint, row.policy) for row in rows}) == len(rows) == 16
    found = {(row.checkpoint, row.policy): row for row in rows}
    small = found["Qwen3.5-0.8B", "max_abs"]
    assert (small.site, small.threshold, small.sqnr_db) == ("final_layernorm", 61.25, pytest.approx(29.07, abs=0.01))
    assert found["Qwen2.5-7B", "clip_q0.999"].threshold == pytest.approx(12352 / 2047, rel=1e-5)


def test_the_table_is_compressed_without_a_time_or_a_name() -> None:
    raw = files("calib.protocols").joinpath("published_activation_stats.csv.gz").read_bytes()
    assert raw[3:8] == bytes(5)  # no flags, so no file name, and time 0
    assert gzip.decompress(raw).count(b"\n") == 4215


@pytest.mark.parametrize(
    "name",
    ["embedding_output", "final_layernorm", "layer_16_hidden", "layer_0_mlp_gate", "encoder.block.layer_3_hidden"],
)
def test_published_names_are_read_back(name: str) -> None:
    assert PaperSite.parse(name).name == name


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="model"):
        PaperSite.parse("model.layers.0:output")
