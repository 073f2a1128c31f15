# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calib.cures.candidate import RowsOrTensor
from calib.scales import load_scales
from tests.cli.commands import SMALL, one_line, run
from tests.cures.models import loud_norms


def test_cures_write_a_checkpoint_that_transformers_loads_and_say_what_each_bought(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "int8"
    code = run("quantize", tiny_llama, "-o", out, *SMALL, "--cure", "smooth,compensate", "--budget", 1.0, "--keep", 1)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "the target of 1 on" in printed
    assert "verified on blocks" in printed
    record = json.loads((out / "cures.json").read_text())
    assert record["rows"][0]["name"] == "none"
    assert record["chosen"] in [row["name"] for row in record["rows"]]
    scales = load_scales(out)
    assert scales.model.parent is not None or not scales.cures
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(loaded(input_ids=torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize(
    ("cures", "weight_granularity"),
    [(("smooth",), "per-row"), (("smooth",), "per-tensor"), (("rotate",), "per-tensor")],
)
def test_the_checkpoint_computes_what_was_judged(
    cures: tuple[str, ...], weight_granularity: RowsOrTensor, tiny_llama: Path, tmp_path: Path
) -> None:
    """Compensated codes, cured weights and the scales of the file: logits equal those of the plan, bit for bit.

    A rotation unties the head of this model from its embedding, which the checkpoint must know.
    """
    from transformers import AutoModelForCausalLM

    from calib.corpus import build_blocks
    from calib.cures.result import CureOptions
    from calib.cures.search import find_cure
    from calib.export import write_checkpoint
    from calib.measurement import MeasureOptions, measure
    from calib.models import open_model
    from calib.quantized import QuantizedModel, QuantizedWeight

    opened = open_model(tiny_llama, device="cpu")
    loud_norms(opened.model)
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=12, max_length=32)
    few = blocks.select(range(8))
    options = CureOptions(cures=(*cures, "compensate"), target=1.0, weight_granularity=weight_granularity)
    cured = find_cure(
        opened, measure(opened, few, MeasureOptions(batch_size=4)), few, blocks.select(range(8, 12)), options
    )
    assert cures[0] in {record.kind for record in cured.scales.cures}
    scalar = {w.scale.numel() == 1 for w in cured.plan.weights.values() if isinstance(w, QuantizedWeight)}
    assert scalar <= {weight_granularity == "per-tensor"}
    rounded = {n: w for n, w in cured.plan.weights.items() if isinstance(w, QuantizedWeight)}
    write_checkpoint(cured.opened, cured.scales, tmp_path, rounded)
    ids = torch.from_numpy(blocks.input_ids[8:10])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
        with QuantizedModel(opened.model, cured.plan):
            expected = opened.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cure", "polish"], "--cure polish: unknown"),
        (["--cure", "none,smooth"], "none goes alone"),
        (["--cure", "auto", "--method", "mse"], "--method mse"),
        (["--cure", "auto", "--target", "0.9"], "--target 0.9"),
        (["--cure", "auto", "--statistics", "ranges"], "--statistics ranges"),
        (["--cure", "auto", "--shard", "1/2"], "--shard 1/2"),
        (["--cure", "keep", "--keep", "-1"], "--keep -1"),
        (["--cure", "auto", "--layout", "documents"], "--layout documents"),
        (["--cure", "auto", "--ignore", "router"], "--sites/--ignore"),
    ],
)
def test_what_does_not_fit_a_search_is_refused_in_one_line(
    given: list[str], said: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", tiny_llama, "-o", tmp_path / "x", *SMALL, *given) == 2
    assert said in one_line(capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_a_measurement_cannot_be_cured(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", measured, "-o", tmp_path / "x", "--cure", "auto") == 2
    assert "pass the MODEL" in one_line(capsys.readouterr().err)
