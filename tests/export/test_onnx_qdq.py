# SPDX-License-Identifier: Apache-2.0
"""Graphs are executed by ONNX Runtime and OpenVINO, in integers, and must give what our own arithmetic gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from calib.errors import ModelError, UsageError
from calib.export import ExportSummary, export_scales, verify_export
from calib.export.onnx_emulate import float_twin
from calib.export.onnx_lint import integer_layers, session
from calib.export.read_onnx import read_onnx
from calib.export.report import ConsumerReport, Verification
from calib.scales import load_scales
from tests.export.conftest import Lab, lab, problems_of_changed_graph

onnx = pytest.importorskip("onnx")
from onnx import numpy_helper  # noqa: E402 - only if there is onnx

LAYERS = {"bert": 13, "llama": 21, "gpt2": 8}


def exported(held: Lab, folder: Path, **options: Any) -> ExportSummary:
    return export_scales(held.scales(**options), folder, held.opened, to="onnx-qdq")


@pytest.fixture(scope="module")
def bert_folder(bert: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "bert"
    exported(bert, folder, symmetric=False)
    return folder


def computed_as_its_processor_does(found: Verification) -> ConsumerReport:
    """Each layer is exact; or, where the processor adds products in 16 bits, equal to that, and verification fails."""
    report = found.consumer
    assert report is not None
    assert report.layers_exact + report.saturating_layers == report.layers
    if report.saturating_layers == 0:
        assert found.problems == []
        assert report.layer_difference < 1e-6
        assert report.model_difference <= report.allowance
    else:
        assert "saturate on this processor" in found.problems[0]
    return report


@pytest.mark.parametrize(("name", "symmetric"), [("bert", True), ("llama", False), ("gpt2", True)])
def test_every_linear_layer_runs_in_integers_in_both_runtimes(
    name: str, symmetric: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    held: Lab = request.getfixturevalue(name)
    summary = exported(held, tmp_path / "out", symmetric=symmetric)
    assert len(summary.quantized) == LAYERS[name]
    assert f"runs {LAYERS[name]} of {LAYERS[name]} quantized layers in integers" in summary.notes[-1]
    for consumer in ("onnxruntime", "openvino"):
        report = computed_as_its_processor_does(verify_export(tmp_path / "out", consumer, model=held.opened))
        assert report.integer_layers == report.layers == LAYERS[name]
        assert report.scales_read == report.scales == 2 * LAYERS[name]
        assert report.saturating_layers or report.model_difference < 0.01
        assert report.allowance < 0.1


def test_the_float_twin_has_no_integer_layer_and_gives_nearly_the_same(bert_folder: Path) -> None:
    from calib.export.onnx_emulate import token_feed
    from calib.export.openvino_run import compiled, integer_products

    read = read_onnx(bert_folder / "model.onnx")
    twin = float_twin(read)
    assert not {"QuantizeLinear", "DequantizeLinear", "Gemm"} & {node.op_type for node in twin.graph.node}
    assert integer_products(compiled(twin.SerializeToString())) == 0
    feed = token_feed(read, bert_folder)
    plain = session(twin.SerializeToString()).run(None, feed)[0]
    rounded = session(bert_folder / "model.onnx").run(None, feed)[0]
    assert 0 < np.abs(plain - rounded).max() < 0.1 * np.abs(plain).max()


def test_between_products_there_are_two_dimensions_and_no_slow_norm(bert_folder: Path, tmp_path: Path) -> None:
    graph = onnx.load(bert_folder / "model.onnx").graph
    names = {name for node in graph.node for name in node.output}
    made = {output: node for node in graph.node for output in node.output}
    for layer in range(2):
        flat = made[f"bert.encoder.layer.{layer}.output.dense/flat"]
        assert made[flat.input[0]].op_type == "Gelu"
        assert made[made[flat.input[0]].input[0]].op_type == "Gemm"  # no way back to three dimensions in between
    assert "rows/lead" in names  # made once: attention and the output need three dimensions
    assert sum(name.endswith("/lead") for name in names) == 1
    session(bert_folder / "model.onnx", optimised=tmp_path / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert "SkipLayerNormalization" not in kinds
    assert kinds.count("LayerNormalization") == 6
    session(a_norm_of_three_dimensions(tmp_path), optimised=tmp_path / "plain.onnx")
    assert "SkipLayerNormalization" in [node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node]


def a_norm_of_three_dimensions(tmp_path: Path) -> Path:
    """An addition and a norm in three dimensions, as torch exports them."""
    from onnx import TensorProto, helper

    ones = numpy_helper.from_array(np.ones(64, np.float32), "ones")
    three = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b", 64]) for name in ("x", "y", "z")]
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "ones", "ones"], ["z"], axis=-1),
    ]
    graph = helper.make_graph(nodes, "before", three[:2], three[2:], [ones])
    path = tmp_path / "before.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_a_graph_that_runtimes_keep_in_float_is_told_from_one_in_integers(bert_folder: Path, tmp_path: Path) -> None:
    model = onnx.load(bert_folder / "model.onnx")
    (node,) = (n for n in model.graph.node if n.name == "bert.encoder.layer.0.intermediate.dense/gemm")
    bias = next(n for n in model.graph.node if n.output[0] == node.input[2])
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    plain = (values[bias.input[0]] * values[bias.input[1]]).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(plain, "plain_bias"))
    node.input[2] = "plain_bias"
    onnx.save(model, tmp_path / "model.onnx")
    found = integer_layers(tmp_path / "model.onnx")
    assert len(found) == 12
    assert "bert.encoder.layer.0.intermediate.dense" not in found


def test_names_of_the_graph_are_kept_beside_it(bert_folder: Path) -> None:
    aliases = load_scales(bert_folder).aliases["onnx"]
    graph = onnx.load(bert_folder / "model.onnx").graph
    names = {name for node in graph.node for name in [*node.input, *node.output]}
    assert len(aliases) == 26
    assert set(aliases.values()) <= names
    assert {"config.json", "tokenizer.json", "scales.json"} <= {path.name for path in bert_folder.iterdir()}


def change_scale(value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "bert.encoder.layer.1.output.dense/scale":
                tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), tensor.name))

    return change


def halve_codes(model: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "bert.encoder.layer.1.output.dense/weight_quantized":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) // 2, tensor.name))


def drop_quantization(model: Any) -> None:
    for node in model.graph.node:
        if node.name == "bert.encoder.layer.1.output.dense/gemm":
            node.input[0] = "bert.encoder.layer.1.output.dense/flat"


def swap_weights(model: Any) -> None:
    first, second = (
        next(t for t in model.graph.initializer if t.name == f"bert.encoder.layer.{i}.output.dense/weight_scale")
        for i in range(2)
    )
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_scale(np.nan), "holds nan"),
        (change_scale(0), "holds 0.0"),
        (change_scale(0.5), "layer.1.output.dense:input: scale is 0.5"),
        (halve_codes, "they are of another scale"),
        (drop_quantization, "layer.1.output.dense: is not quantized in the graph"),
        (swap_weights, "scales are not those of the scale file"),
    ],
    ids=["NaN", "zero", "other", "codes", "missing", "swapped"],
)
def test_damage_of_a_graph_is_found_and_named(
    change: Callable[[Any], None], said: str, bert_folder: Path, tmp_path: Path
) -> None:
    problems = problems_of_changed_graph(change, bert_folder, tmp_path / "copy")
    assert any(said in problem for problem in problems), problems


def test_what_cannot_be_a_graph_in_integers_is_refused(bert: Lab, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--bits 4"):
        exported(bert, tmp_path / "out", bits=4)
    scales = bert.scales()
    everything = scales.model_copy(update={"ignore": [n.rpartition(":")[0] for n in scales.tensors] + [
        reader.rpartition(":")[0] for tensor in scales.tensors.values() for reader in tensor.shared_with
    ]})  # fmt: skip
    with pytest.raises(ModelError, match="the scale file leaves it in float"):
        export_scales(everything, tmp_path / "out", bert.opened, to="onnx-qdq")
    assert not (tmp_path / "out").exists()


def test_the_attention_of_the_model_is_as_before(bert: Lab, bert_folder: Path) -> None:
    assert bert.opened.model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.isfinite(bert.opened.model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.slow
def test_minilm_runs_wholly_in_integers_and_faster_than_float(minilm: Path, tmp_path: Path) -> None:
    held = lab(minilm, samples=32, max_length=128, corpus="builtin")
    summary = exported(held, tmp_path / "out", symmetric=False)
    assert len(summary.quantized) == 36  # all but the pooler, which the output does not need
    for consumer in ("onnxruntime", "openvino"):
        report = computed_as_its_processor_does(verify_export(tmp_path / "out", consumer, model=held.opened))
        assert report.integer_layers == report.layers == 36
        assert report.speed is not None
        if report.saturating_layers == 0:  # else the processor lacks the instructions that make integers fast
            assert report.speed > 1.5  # a floor that a busy machine holds; the figure is in benchmarks/results


def test_speed_is_a_median_of_pairs() -> None:
    from calib.export.compare import paired_speed

    seen: list[str] = []
    ratios = paired_speed(lambda: seen.append("slow"), lambda: seen.append("fast"), pairs=3)
    assert seen == ["slow", "fast"] * 5
    assert len(ratios) == 3
    assert median(ratios) > 0


def test_a_model_that_torch_cannot_export_says_its_own_reason(
    bert: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        try:
            raise ValueError("needs pixels too")
        except ValueError as error:
            raise RuntimeError("\x1b[96mThis is step 1/3\x1b[0m of exporting") from error

    monkeypatch.setattr(torch.onnx, "export", stop)
    with pytest.raises(ModelError, match=r"export it to ONNX \(needs pixels too\); choose a format without a graph"):
        exported(bert, tmp_path / "out", symmetric=False)
    assert not (tmp_path / "out").exists()
