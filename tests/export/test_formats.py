# SPDX-License-Identifier: Apache-2.0
"""Every format: what its real consumer, its own parser or its published schema makes of it."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from calib.corpus import build_blocks
from calib.cures.result import CURES
from calib.errors import ArtifactError, CalibError, UsageError
from calib.export import FORMATS, export_scales, verify_export, write_checkpoint
from calib.export.aimet import Encoding, encodings
from calib.export.read_aimet import read_aimet
from calib.scales import load_scales
from calib.schema.scales import CureRecord
from tests.export.conftest import Lab


def export(held: Lab, folder: Path, to: str, *, kv_cache: bool = False, **options: Any) -> Path:
    export_scales(held.scales(**options), folder, held.opened, to=to, measurement=held.measurement, kv_cache=kv_cache)
    return folder


def input_amax(held: Lab, module: str) -> float:
    """Straight from the statistics."""
    for site in held.measurement.sites.values():
        if f"{module}:input" in [site.name, *site.aliases]:
            return float(site.statistics.range.amax)
    raise AssertionError(module)


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "to",
    [
        "aimet:0.6.1", "aimet:1.0.0", "aimet:2.0.0", "csv", "imatrix:gguf", "imatrix:dat", "modelopt", "openvino",
        "ort-calibration", "quark", "sglang-kv", "smoothquant:pt", "smoothquant:safetensors", "torchao",
    ],
)  # fmt: skip
def test_what_is_written_passes_its_own_check_and_what_is_changed_does_not(to: str, llama: Lab, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "out", to, kv_cache=to == "modelopt")
    found = verify_export(folder, run=False)
    assert found.problems == []
    assert found.scales_read == found.scales > 0
    manifest = json.loads((folder / "calib_export.json").read_text())
    assert manifest["to"] == to.partition(":")[0]
    for name in manifest["files"]:
        copy = shutil.copytree(folder, tmp_path / f"without-{name}")
        (copy / name).unlink()
        try:
            assert verify_export(copy, run=False).problems
        except CalibError as error:
            assert name in str(error)  # noqa: PT017 - either is an answer


def test_every_format_names_its_consumers_and_what_proves_it() -> None:
    from calib.export.checks import CHECKS

    assert set(CHECKS) == set(FORMATS)
    for found in FORMATS.values():
        assert found.consumers
        assert found.proven
        assert found.summary
        assert set(found.cures) <= {*CURES, "clip"}


def test_csv_has_a_row_for_every_name_and_reads_back_as_the_same_float32(llama: Lab, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "out", "csv")
    with (folder / "scales.csv").open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    scales = llama.scales()
    assert len(rows) == sum(1 + len(tensor.shared_with) for tensor in scales.tensors.values())
    for name, tensor in scales.tensors.items():
        numbers = [float(number) for number in rows[name]["scale"].split()]
        assert numbers == (tensor.scale if isinstance(tensor.scale, list) else [tensor.scale])


@pytest.fixture(scope="module")
def one_graph(llama: Lab) -> Any:
    """torch's export of the small model, once for all tests of this file that only differ in what is beside it."""
    from calib.export import onnx_graph

    return onnx_graph.float_graph(llama.opened)


@pytest.fixture(autouse=True)
def _exported_once(one_graph: Any, llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    from calib.export import aimet, onnx_graph, onnx_qdq, ort_calibration

    def once(opened: Any) -> Any:
        if opened is llama.opened:
            return onnx_graph.FloatGraph(copy.deepcopy(one_graph.model), one_graph.products)
        return onnx_graph.float_graph(opened)

    for module in (aimet, onnx_qdq, ort_calibration):
        monkeypatch.setattr(module, "float_graph", once)


@pytest.mark.parametrize("symmetric", [True, False])
def test_aimet_versions_say_the_same_of_every_tensor(symmetric: bool, llama: Lab, tmp_path: Path) -> None:
    held = []
    for version in ("0.6.1", "1.0.0", "2.0.0"):
        folder = export(llama, tmp_path / version, f"aimet:{version}", symmetric=symmetric)
        held.append(
            {n: (e.scale, e.zero_point, e.symmetric) for n, e in read_aimet(folder / "model.encodings").items()}
        )
    assert held[0] == held[1] == held[2]
    name = load_scales(folder).aliases["onnx"][f"{DOWN}:input"]
    (scale,), point, _ = held[0][name]
    if symmetric:
        assert scale == pytest.approx(input_amax(llama, DOWN) / 127, rel=1e-7)
        assert point == 0
    else:
        assert -128 < point < 127


def test_aimet_offsets_count_from_the_first_code() -> None:
    one = Encoding("x", False, [0.5], 3, False)
    assert encodings([one], "0.6.1")["activation_encodings"]["x"] == [
        {
            "bitwidth": 8,
            "dtype": "int",
            "is_symmetric": "False",
            "scale": 0.5,
            "offset": -131,
            "min": -65.5,
            "max": 62.0,
        }
    ]
    (entry,) = encodings([Encoding("w", True, [0.5, 0.25], 0, True)], "1.0.0")["param_encodings"]
    assert (entry["offset"], entry["enc_type"], entry["is_sym"]) == ([-128, -128], "PER_CHANNEL", True)
    assert encodings([one], "2.0.0")["encodings"] == [
        {"name": "x", "output_dtype": "int8", "y_scale": 0.5, "y_zero_point": 3}
    ]


def test_aimet_names_are_tensors_of_the_graph_beside(llama: Lab, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = export(llama, tmp_path / "out", "aimet")
    graph = onnx.load(folder / "model.onnx").graph
    names = {name for node in graph.node for name in [*node.input, *node.output]}
    held = read_aimet(folder / "model.encodings")
    assert set(held) <= names
    assert sum(one.parameter for one in held.values()) == 21
    assert sum(not one.parameter for one in held.values()) == 3 * 4  # q/k/v and gate/up read one tensor each


def test_encodings_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.encodings"
    for content in (
        {"version": "3.0"},
        {"version": "0.6.1"},
        {"version": "2.0.0", "encodings": [{"name": "x", "output_dtype": "int4", "y_scale": 1}]},
        {"version": "1.0.0", "activation_encodings": [{"name": "x", "bw": 16, "dtype": "INT"}], "param_encodings": []},
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ArtifactError):
            read_aimet(path)


def test_torchao_runs_every_layer_in_integers_with_our_scales(llama: Lab, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "out", "torchao")
    found = verify_export(folder, model=llama.opened)
    assert found.problems == []
    report = found.consumer
    assert report is not None
    assert report.integer_layers == report.layers_exact == report.scales_read == 21
    content = json.loads((folder / "torchao_scales.json").read_text())["input_scales"]
    assert content[DOWN] == pytest.approx(input_amax(llama, DOWN) / 127.5, rel=1e-7)
    with pytest.raises(UsageError, match="--model"):
        verify_export(folder)


def test_torchao_and_quark_refuse_zero_points(llama: Lab, tmp_path: Path) -> None:
    for to in ("torchao", "quark"):
        with pytest.raises(UsageError, match="zero point"):
            export(llama, tmp_path / to, to, symmetric=False)


def test_imatrix_is_read_by_gguf_and_holds_sums_of_squares(llama: Lab, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = export(llama, tmp_path / "out", "imatrix")
    reader = gguf.GGUFReader(folder / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    assert "general.architecture" not in reader.fields
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(held) == 2 * 22  # with the output head
    hidden = {}
    module = llama.opened.model.get_submodule(DOWN)
    handle = module.register_forward_pre_hook(lambda _, args: hidden.update(x=args[0]))

    ids = build_blocks(["builtin:speeches"], llama.opened.tokenizer, samples=4, max_length=32).input_ids
    with torch.no_grad():
        llama.opened.model(input_ids=torch.from_numpy(ids))
    handle.remove()
    expected = hidden["x"].double().square().sum((0, 1))
    np.testing.assert_allclose(held["blk.1.ffn_down.weight.in_sum2"].reshape(-1), expected, rtol=1e-5)
    assert held["blk.1.ffn_down.weight.counts"].reshape(-1).tolist() == [4 * 32]


def test_the_older_imatrix_holds_mean_squares_times_calls(llama: Lab, tmp_path: Path) -> None:
    new, old = export(llama, tmp_path / "a", "imatrix"), export(llama, tmp_path / "b", "imatrix:dat")
    data = (old / "imatrix.dat").read_bytes()
    (entries,) = struct.unpack_from("<i", data)
    assert entries == 22
    place, held = 4, {}
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", data, place)
        name = data[place + 4 : place + 4 + length].decode()
        calls, values = struct.unpack_from("<ii", data, place + 4 + length)
        start = place + 12 + length
        held[name] = np.frombuffer(data, "<f4", values, start) / calls
        place = start + 4 * values
    (last, length) = struct.unpack_from("<ii", data, place)
    assert (last, len(data)) == (4, place + 8 + length)
    import gguf

    sums = {t.name: t.data.reshape(-1) for t in gguf.GGUFReader(new / "imatrix.gguf").tensors}
    for name, means in held.items():
        np.testing.assert_allclose(means * 128, sums[f"{name}.in_sum2"], rtol=1e-5)


@pytest.mark.parametrize("variant", ["pt", "safetensors"])
def test_act_scales_are_the_largest_magnitudes_of_channels(variant: str, llama: Lab, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "out", f"smoothquant:{variant}")
    path = folder / f"act_scales.{variant}"
    held = torch.load(path, weights_only=True) if variant == "pt" else load_file(path)
    assert len([name for name in held if "lm_head" not in name]) == 21
    assert held[DOWN].dtype == torch.float32
    assert float(held[DOWN].max()) == pytest.approx(input_amax(llama, DOWN), rel=1e-7)
    assert tuple(held[DOWN].shape) == (128,)


def test_sglang_gets_the_larger_of_key_and_value_of_every_layer(llama: Lab, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "out", "sglang-kv")
    content = json.loads((folder / "kv_cache_scales.json").read_text())
    assert content["model_type"] == "llama"
    assert content["kv_cache"]["dtype"] == "float8_e4m3fn"
    factors = content["kv_cache"]["scaling_factor"]
    assert list(factors) == ["0"]
    assert list(factors["0"]) == ["0", "1", "2"]
    sites = llama.measurement.sites
    names = {alias: site for site in sites.values() for alias in [site.name, *site.aliases]}
    pair = [names[f"model.layers.1.self_attn:{part}"].statistics.range.amax for part in ("key", "value")]
    assert factors["0"]["1"] == pytest.approx(max(pair) / 448, rel=1e-6)


def test_onnxruntimes_own_quantizer_takes_the_overrides(bert: Lab, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    import onnx
    from onnx import numpy_helper

    from calib.export.ort_calibration import ort_overrides

    folder = export(bert, tmp_path / "out", "ort-calibration")
    overrides = ort_overrides(folder)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            ids = np.ones((1, 8), np.int64)
            self.feeds = iter([{"input_ids": ids, "attention_mask": ids}])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantization.quantize_static(
        str(folder / "model.onnx"),
        str(tmp_path / "theirs.onnx"),
        Reader(),
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={"TensorQuantOverrides": overrides},
    )
    graph = onnx.load(tmp_path / "theirs.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    theirs = {n.input[0]: float(constants[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear"}
    assert set(overrides) <= set(theirs)
    for name, (one,) in overrides.items():
        assert theirs[name] == float(one["scale"])
    table = json.loads((folder / "calibration.json").read_text())
    from onnxruntime.quantization.calibrate import TensorData

    for name, entry in table["data"].items():
        read = TensorData(lowest=np.float32(entry["lowest"]["data"]), highest=np.float32(entry["highest"]["data"]))
        assert float(np.abs([read.lowest, read.highest]).max()) / 127 == pytest.approx(theirs[name], rel=1e-6)


def test_openvino_files_compute_what_the_graph_computes(bert: Lab, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from calib.export.onnx_emulate import token_feed
    from calib.export.openvino_run import compiled, integer_products
    from calib.export.read_onnx import read_onnx

    ir, graph = export(bert, tmp_path / "ir", "openvino"), export(bert, tmp_path / "graph", "onnx-qdq")
    feed = token_feed(read_onnx(graph / "model.onnx"), graph)
    held = compiled(ir / "model.xml")
    assert integer_products(held) == 13
    np.testing.assert_array_equal(held(feed)[0], compiled(graph / "model.onnx")(feed)[0])
    assert openvino.Core().read_model(str(ir / "model.xml")) is not None


def test_quark_and_modelopt_checkpoints_have_the_shapes_their_readers_ask_for(llama: Lab, tmp_path: Path) -> None:
    quark, modelopt = export(llama, tmp_path / "q", "quark"), export(llama, tmp_path / "m", "modelopt", kv_cache=True)
    held = load_file(quark / "model.safetensors")
    assert held[f"{DOWN}.weight"].dtype == torch.int8
    assert tuple(held[f"{DOWN}.weight_scale"].shape) == (64,)
    assert tuple(held[f"{DOWN}.input_scale"].shape) == (1,)
    config = json.loads((quark / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quark"
    assert config["exclude"] == ["lm_head"]
    assert config["global_quant_config"]["weight"]["qscheme"] == "per_channel"

    held = load_file(modelopt / "model.safetensors")
    assert held[f"{DOWN}.weight"].dtype == torch.float8_e4m3fn
    assert held[f"{DOWN}.weight_scale"].shape == held[f"{DOWN}.input_scale"].shape == torch.Size([])
    assert float(held[f"{DOWN}.input_scale"]) == pytest.approx(input_amax(llama, DOWN) / 448, rel=1e-6)
    attention = "model.layers.1.self_attn"
    scales = {float(held[f"{attention}.{part}_proj.weight_scale"]) for part in "qkv"}
    assert len(scales) == 1
    own = llama.opened.model.get_submodule(attention)
    largest = max(float(own.get_submodule(f"{part}_proj").weight.detach().abs().max()) for part in "qkv")
    assert scales.pop() == pytest.approx(largest / 448, rel=1e-6)
    assert f"{attention}.k_proj.k_scale" in held
    content = json.loads((modelopt / "hf_quant_config.json").read_text())["quantization"]
    assert content == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}


def test_a_measurement_of_something_else_is_refused(llama: Lab, bert: Lab, tmp_path: Path) -> None:
    scales = llama.scales()
    with pytest.raises(ArtifactError, match="another measurement"):
        export_scales(scales, tmp_path / "out", to="imatrix", measurement=bert.measurement)
    with pytest.raises(UsageError, match="--measurement"):
        export_scales(scales, tmp_path / "out", to="smoothquant")


def test_a_missing_package_is_named_with_the_command(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.export import write

    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'calib\[torchao\]'"):
        export(llama, tmp_path / "out", "torchao")


@pytest.mark.parametrize("name", sorted(name for name, found in FORMATS.items() if "scale" not in found.cures))
def test_no_format_takes_scales_that_need_an_operation_while_the_model_runs(
    name: str, llama: Lab, tmp_path: Path
) -> None:
    """It would load, compute something else, and nobody would say so."""
    scaled = CureRecord(kind="scale", summary="inputs", needs="online-op")
    scales = llama.scales().model_copy(update={"cures": [scaled]})
    with pytest.raises(ArtifactError, match="cannot express the cure 'scale'"):
        export_scales(scales, tmp_path / "out", llama.opened, to=name, measurement=llama.measurement)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="an operation that no checkpoint holds"):
        write_checkpoint(llama.opened, scales, tmp_path)
