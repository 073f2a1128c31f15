# SPDX-License-Identifier: Apache-2.0
"""What was exported and imported again is the same; what another program wrote is read without a record of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from calib.errors import ArtifactError
from calib.export import export_scales, verify_export
from calib.export.implied_range import asymmetric_range, symmetric_range
from calib.export.importing import import_scales
from calib.export.linears import LinearRange, linear_ranges
from calib.scales import load_scales, save_scales
from tests.cli.commands import one_line, run
from tests.export.conftest import Lab

usable = st.floats(2.0**-100, 2.0**60, width=32)


@given(usable, st.sampled_from([127.0, 127.5, 448.0]))
def test_a_symmetric_range_gives_its_scale_again(largest: float, intervals: float) -> None:
    scale = LinearRange("x", -largest, largest, True).symmetric_scale(intervals)
    amax = symmetric_range(scale, intervals)
    assert LinearRange("x", -amax, amax, True).symmetric_scale(intervals) == scale
    assert amax == pytest.approx(largest, rel=1e-6)


@settings(max_examples=400)
@given(usable, st.floats(0, 1), st.booleans())
def test_an_asymmetric_range_gives_its_scale_and_zero_point_again(width: float, share: float, single: bool) -> None:
    def grid(low: float, high: float) -> tuple[float, int]:
        held = LinearRange("x", low, high, False)
        return held.asymmetric_grid() if single else held.grid()

    low, high = -float(np.float32(width * share)), float(np.float32(width * (1 - share)))
    scale, point = grid(low, high)
    found = asymmetric_range(scale, point, grid)
    assert found[0] <= 0 <= found[1]
    assert grid(*found) == (scale, point)


FORMATS = [
    ("compressed-tensors:int8", {}),
    ("compressed-tensors:int8", {"symmetric": False}),
    ("compressed-tensors:int8", {"method": "mse"}),
    ("compressed-tensors:fp8", {}),
    ("onnx-qdq", {}),
    ("onnx-qdq", {"symmetric": False}),
    ("aimet:0.6.1", {"symmetric": False}),
    ("aimet:1.0.0", {}),
    ("aimet:2.0.0", {"symmetric": False}),
]


@pytest.mark.parametrize(("to", "options"), FORMATS)
def test_import_inverts_export(to: str, options: dict[str, Any], bert: Lab, tmp_path: Path) -> None:
    scales = bert.scales(**options)
    export_scales(scales, tmp_path / "out", bert.opened, to=to)
    found = import_scales(tmp_path / "out")
    ours, theirs = linear_ranges(scales).ranges, linear_ranges(found).ranges
    manifest = json.loads((tmp_path / "out" / "calib_export.json").read_text())
    assert set(theirs) == set(manifest["quantized"])
    for name, range_ in theirs.items():
        if to == "compressed-tensors:fp8":
            assert range_.symmetric_scale(448) == ours[name].symmetric_scale(448)
        elif options.get("symmetric", True):
            intervals = 127.5 if to.startswith("compressed") else 127
            assert range_.symmetric_scale(intervals) == ours[name].symmetric_scale(intervals)
        elif to.startswith("compressed"):
            assert range_.asymmetric_grid() == ours[name].asymmetric_grid()
        else:
            assert range_.grid() == ours[name].grid()
        assert range_.weight is not None
        assert range_.weight.amax == pytest.approx(ours[name].weight.amax, rel=0.02)  # type: ignore[union-attr]
    assert save_scales(found, tmp_path / "again").is_file()


@pytest.mark.parametrize("scale", [0.027463078498840332, 0.02746308036148548, 0.03125])
def test_a_scale_whose_0_has_code_0_is_given_back_whichever_formula_it_came_from(scale: float, tmp_path: Path) -> None:
    """No amax / 127 is 0.027463078498840332 in float32; the range of an asymmetric grid is."""
    entry = {"name": "x", "output_dtype": "int8", "y_scale": scale, "y_zero_point": 0}
    file = tmp_path / "x.encodings"
    file.write_text(json.dumps({"version": "2.0.0", "encodings": [entry]}))
    tensor = import_scales(file).tensors["x:input"]
    read = LinearRange("x", tensor.range_min, tensor.range_max, tensor.scheme.symmetric)
    assert read.grid() == (scale, 0)
    assert tensor.scheme.symmetric == (scale != 0.027463078498840332)


def test_scales_exported_imported_and_exported_again_are_the_same_checkpoint(bert: Lab, tmp_path: Path) -> None:
    export_scales(bert.scales(symmetric=False), tmp_path / "a", bert.opened, to="compressed-tensors")
    export_scales(import_scales(tmp_path / "a"), tmp_path / "b", bert.opened, to="compressed-tensors")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert verify_export(tmp_path / "b").problems == []


def test_an_export_of_another_program_is_read_without_our_files(llama: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    export_scales(llama.scales(), folder, llama.opened, to="compressed-tensors", kv_cache=True)
    for name in ("scales.json", "calib_export.json"):
        (folder / name).unlink()
    found = import_scales(folder)
    assert found.model.source_format == "imported:compressed-tensors"
    assert found.model.architecture == "LlamaForCausalLM"
    assert found.corpus.tokens == 0
    assert found.ignore == ["lm_head"]
    assert sum(tensor.kind == "key" for tensor in found.tensors.values()) == 3
    checked = verify_export(folder)
    assert checked.problems == []
    assert checked.consumer is not None
    assert "no scales.json" in checked.not_checked[0]


def test_the_command_sets_published_ranges_beside_ones_own(
    llama: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_scales(llama.scales(method="percentile:90"), tmp_path / "out", llama.opened, to="compressed-tensors")
    own = save_scales(llama.scales(), tmp_path / "own")
    assert run("import", tmp_path / "out", "-o", tmp_path / "imported", "--compare", own) == 0
    printed = capsys.readouterr().out
    assert "21 tensors in both" in printed
    ratios = [float(line.split()[0]) for line in printed.splitlines() if line.startswith("  ")]
    assert ratios == sorted(ratios)
    assert all(ratio < 1 for ratio in ratios)
    assert load_scales(tmp_path / "imported").method == "imported:compressed-tensors"


def test_what_holds_no_scales_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="is no compressed-tensors checkpoint"):
        import_scales(tmp_path / "empty")
    assert run("import", tmp_path / "empty", "-o", tmp_path / "out") == 1
    assert "is no compressed-tensors checkpoint" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
