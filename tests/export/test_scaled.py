# SPDX-License-Identifier: Apache-2.0
"""A model with scaled inputs and error-compensated weights, from `calib quantize` to a graph that runs in integers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.errors import ArtifactError
from calib.export import FORMATS, export_scales, verify_export
from calib.export.importing import import_scales
from calib.export.onnx_emulate import layer_outputs, token_feed
from calib.export.onnx_lint import session
from calib.export.read_onnx import QdqLinear, read_onnx
from calib.export.report import ConsumerReport
from calib.models import OpenedModel, open_model
from calib.quantized.rounded_file import ROUNDED_FILE
from calib.scales import load_scales
from tests.cli.commands import SMALL, run
from tests.export.conftest import problems_of_changed_graph

onnx = pytest.importorskip("onnx")
from onnx import numpy_helper  # noqa: E402 - only if there is onnx

SCALED, PRODUCTS, LAYERS = 11, 7, 13
QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def loud(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT in which every layer reads a loud channel, and the layers' small weights pay for it."""
    folder = shutil.copytree(tiny_bert, tmp_path_factory.mktemp("loud") / "bert")
    opened = open_model(tiny_bert, device="cpu")
    with torch.no_grad():
        for layer in opened.model.bert.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight[5] = 40.0
            layer.intermediate.dense.bias[5] = 40.0
        opened.model.bert.embeddings.LayerNorm.weight[5] = 40.0
    opened.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cured(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cured") / "int8"
    given = ["--cure", "scale,compensate", "--target", 1.0, "--asymmetric", "-q"]
    assert run("quantize", loud, "-o", out, *SMALL, *given) == 0
    return out


@pytest.fixture(scope="module")
def graph(loud: Path, cured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graph") / "onnx"
    assert run("export", cured, "--to", "onnx-qdq", "--model", loud, "-o", out, "-q") == 0
    return out


def fresh(folder: Path) -> OpenedModel:
    return open_model(folder, device="cpu")


def test_the_search_takes_both_cures_and_writes_what_they_need(cured: Path) -> None:
    scales = load_scales(cured)
    assert [cure.kind for cure in scales.cures] in (["scale", "compensate"], ["scale", "compensate", "clip"])
    factors = scales.cures[0].settings["factors"]
    assert isinstance(factors, dict)
    assert len(factors) == SCALED
    assert (cured / ROUNDED_FILE).is_file()
    assert not (cured / "model.safetensors").exists()  # a checkpoint would load, and be wrong


@pytest.mark.parametrize("consumer", ["onnxruntime", "openvino"])
def test_the_graph_runs_in_integers_and_is_the_quantized_model_with_its_cures(
    consumer: str, loud: Path, graph: Path
) -> None:
    report = verify_export(graph, consumer, model=fresh(loud)).consumer
    assert report is not None
    assert report.integer_layers == report.layers == LAYERS
    assert report.layers_exact + report.saturating_layers == LAYERS  # all are exact where the processor has VNNI
    assert report.model_difference < report.allowance < 0.1


def test_one_product_serves_all_layers_that_read_an_input(cured: Path, graph: Path) -> None:
    read = read_onnx(graph / "model.onnx")
    scaled = load_scales(cured).cures[0].settings["factors"]
    assert isinstance(scaled, dict)
    made = {name: node for node in read.model.graph.node for name in node.output}
    products = set()
    for name in scaled:
        source = made[read.linears[name].source]
        while source.op_type == "Reshape":
            source = made[source.input[0]]
        assert source.op_type == "Mul"
        products.add(source.output[0])
    assert len(products) == PRODUCTS  # q, k and v of two layers share one each


def test_the_cured_graph_is_nearer_to_float_than_the_plain_one(loud: Path, graph: Path, tmp_path: Path) -> None:
    assert run("quantize", loud, "-o", tmp_path / "int8", *SMALL, "--asymmetric", "-q") == 0
    assert run("export", tmp_path / "int8", "--to", "onnx-qdq", "--model", loud, "-o", tmp_path / "onnx", "-q") == 0
    feed = token_feed(read_onnx(graph / "model.onnx"), graph)
    model = fresh(loud).model
    with torch.no_grad():
        exact = model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits.numpy()
    cured, plain = (session(folder / "model.onnx").run(None, feed)[0] for folder in (graph, tmp_path / "onnx"))
    assert np.square(cured - exact).sum() < np.square(plain - exact).sum() / 2


def test_an_import_keeps_the_cures(cured: Path, graph: Path) -> None:
    found, wanted = import_scales(graph), load_scales(cured)
    assert found.cures == wanted.cures
    for name in found.tensors:
        if name.endswith(":input"):
            assert any(name in (n, *tensor.shared_with) for n, tensor in wanted.tensors.items())


def test_openvino_ir_is_written_too(loud: Path, cured: Path, tmp_path: Path) -> None:
    assert run("export", cured, "--to", "openvino", "--model", loud, "-o", tmp_path / "ir", "-q") == 0
    assert run("verify", tmp_path / "ir", "-q") == 0


def test_evaluation_restores_both_cures(loud: Path, cured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--samples", "2", "--max-length", "32", "-d", "builtin:speeches", "-q", "--layers", "0", "--json"]
    assert run("evaluate", loud, "--scales", cured, *given) == 0
    assert not any("compensat" in note for note in json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize("to", sorted({*FORMATS} - {"onnx-qdq", "openvino"}))
def test_no_other_format_takes_a_scaled_input(to: str, loud: Path, cured: Path, tmp_path: Path) -> None:
    opened = fresh(loud)
    with pytest.raises(ArtifactError, match="cannot express the cure 'scale'"):
        export_scales(load_scales(cured), tmp_path / "out", opened, to=to, source=cured)
    assert not any(module._forward_pre_hooks for module in opened.model.modules())


def drop_product(model: Any) -> None:
    """Has the layers read what the product reads."""
    made = {name: node for node in model.graph.node for name in node.output}
    quantize = made[made[f"{QUERY}/dequantized"].input[0]]
    below = made[quantize.input[0]]
    while below.op_type == "Reshape":
        quantize, below = below, made[below.input[0]]
    constants = {tensor.name for tensor in model.graph.initializer}
    quantize.input[0] = next(name for name in below.input if name not in constants)


def change(name: str, by: Callable[[Any], Any]) -> Callable[[Any], None]:
    def changed(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(by(numpy_helper.to_array(tensor)), name))

    return changed


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_product, "input: is not multiplied by the factors"),
        (change(f"{QUERY}/weight_quantized", lambda codes: codes // 2), "weight: is not the one that was rounded"),
        (change(f"{QUERY}/weight_scale", lambda scale: scale * 2), "weight: is not the one that was rounded"),
    ],
    ids=["product", "codes", "scale"],
)
def test_damage_is_found_and_named(damage: Callable[[Any], None], said: str, graph: Path, tmp_path: Path) -> None:
    problems = problems_of_changed_graph(damage, graph, tmp_path / "copy")
    assert any(f"{QUERY}:{said}" in problem for problem in problems), problems


def test_rounded_weights_that_are_missing_damaged_or_others_are_refused(
    loud: Path, cured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(cured, tmp_path / "copy")
    given = ["export", folder, "--to", "onnx-qdq", "--model", loud, "-o", tmp_path / "out"]
    content = (folder / ROUNDED_FILE).read_bytes()
    (folder / ROUNDED_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(*given) == 1
    assert "is not the weight that was rounded for these scales" in capsys.readouterr().err
    (folder / ROUNDED_FILE).write_bytes(b"damaged")
    assert run(*given) == 1
    assert "no readable safetensors file" in capsys.readouterr().err
    (folder / ROUNDED_FILE).unlink()
    assert run(*given) == 1
    assert f"{ROUNDED_FILE}: is no readable safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(tiny_bert: Path, cured: Path, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the scales are of another model"):
        export_scales(load_scales(cured), tmp_path / "out", fresh(tiny_bert), to="onnx-qdq", source=cured)
    with pytest.raises(ArtifactError, match="the scales are of another model"):
        verify_export(graph, model=fresh(tiny_bert))


def test_a_processor_that_adds_products_in_16_bits_is_emulated() -> None:
    """255 x 127 twice is beyond 32767; 1 and -1 away from it nothing is lost."""
    codes = np.array([[127], [127], [1]], np.int8)
    ones = np.ones(1, np.float32)
    linear = QdqLinear("layer", 1.0, 0, -128, 127, codes, ones, None, [], "x", "y")
    x = np.array([[127, 127, 3], [-100, 100, 3]], np.float32)
    exact = layer_outputs(linear, x)
    narrow = layer_outputs(linear, x, saturating=True)
    np.testing.assert_array_equal(exact[:, 0], [127 * 127 * 2 + 3, 3])
    np.testing.assert_array_equal(narrow[:, 0], [32767 + 131 - 128 * 255, 3])


def test_saturation_is_told_from_other_differences() -> None:
    report = ConsumerReport("a runtime", 2, 2, 3, 5, 0.2, 0.0, 0.1, saturating_layers=1)
    other, saturating = report.problems
    assert "1 of 5 layers compute something else" in other
    assert "1 of 5 layers saturate on this processor" in saturating
