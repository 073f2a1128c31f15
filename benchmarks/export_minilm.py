# SPDX-License-Identifier: Apache-2.0
"""MiniLM as ONNX Q/DQ and as a compressed-tensors checkpoint: what runs in integers, how fast, and how near to float.

`python benchmarks/export_minilm.py` writes an entry of `results/export_minilm.json`, one for each kind of processor:
with VNNI, integers are multiplied several times as fast as without, and exactly (without, sums of two products saturate
at 16 bits; layers to which that happens are counted). Speed is a ratio of CPU time of alternating
runs in the same runtime, one thread: of the float graph as torch exports it, and of the float graph in the form of the
quantized one (`onnx_rows`), against the quantized one. Embeddings are means over tokens of 16 blocks of 128 tokens that
were not calibrated on; their cosine is with those of the float model.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from assets import fetch
from results_file import RESULTS, environment, median_interval, write

from calib.corpus import build_blocks
from calib.cures import CureOptions, find_cure
from calib.export import export_scales, verify_export
from calib.export.onnx_emulate import float_twin, onnx_plan
from calib.export.onnx_graph import float_graph
from calib.export.onnx_lint import session
from calib.export.read_onnx import read_onnx
from calib.measurement.engine import measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel
from calib.scales import choose_scales
from calib.schema.scales import ScaleFile

PAIRS = 41


def main() -> None:
    opened = open_model(fetch("minilm"), device="cpu")
    blocks = build_blocks([], opened.tokenizer, samples=64, max_length=128)
    measurement = measure(opened, blocks)
    held_out = build_blocks([], opened.tokenizer, samples=16, max_length=128, seed=7).input_ids
    feed = {"input_ids": held_out, "attention_mask": np.ones_like(held_out)}
    trial = Trial(feed, embeddings(model_output(opened.model, feed)), float_graph(opened).model.SerializeToString())
    results: dict[str, Any] = {}
    for grid, symmetric in (("asymmetric", False), ("symmetric", True)):
        scales = choose_scales(measurement, symmetric=symmetric)
        with tempfile.TemporaryDirectory() as folder:
            results[f"onnx-qdq {grid}"] = trial.graph(opened, scales, Path(folder) / "onnx")
            checkpoint = Path(folder) / "checkpoint"
            export_scales(scales, checkpoint, opened, to="compressed-tensors")
            report = verify_export(checkpoint)
            assert report.passed, report.problems
            assert report.consumer is not None
            results[f"compressed-tensors {grid}"] = {
                "consumer": report.consumer.consumer,
                "layers_exact": report.consumer.layers_exact,
                "layers": report.consumer.layers,
                "largest_difference": report.consumer.model_difference,
            }
    given = CureOptions(cures=("scale", "compensate"), target=1.0, symmetric=False)
    judged = build_blocks([], opened.tokenizer, samples=20, max_length=128, seed=5)
    cured = find_cure(opened, measurement, blocks, judged, given)
    with tempfile.TemporaryDirectory() as folder:
        found = trial.graph(cured.opened, cured.scales, Path(folder) / "onnx", weights=cured.plan.rounded)
        results["onnx-qdq cured"] = {"cures": [cure.summary for cure in cured.scales.cures], **found}
    versions = {name: version(name) for name in ("onnxruntime", "openvino", "onnx")}
    before = json.loads((RESULTS / "export_minilm.json").read_text())["processors"]
    write("export_minilm", {"processors": {**before, processor(): {**environment(), **versions, **results}}})


@dataclass(frozen=True)
class Trial:
    """What graphs are compared with.

    Attributes:
        feed: tokens.
        exact: embeddings of the float model.
        plain: the float graph as torch exports it.
    """

    feed: dict[str, Any]
    exact: Any
    plain: bytes

    def graph(self, opened: OpenedModel, scales: ScaleFile, out: Path, **more: Any) -> dict[str, Any]:
        """Exports a graph, and what two runtimes make of it."""
        export_scales(scales, out, opened, to="onnx-qdq", **more)
        read = read_onnx(out / "model.onnx")
        with QuantizedModel(opened.model, onnx_plan(read, opened)):
            ours = embeddings(model_output(opened.model, self.feed))
        found: dict[str, Any] = {"cosine_of_our_quantized_model": cosine(ours, self.exact)}
        baselines = {"as exported": self.plain, "in the same form": float_twin(read).SerializeToString()}
        for consumer in ("onnxruntime", "openvino"):
            verification = verify_export(out, consumer, model=opened)
            report = verification.consumer
            assert report is not None
            assert verification.problems == report.problems
            assert report.layers_exact + report.saturating_layers == report.layers, report.problems
            assert report.saturating_layers or verification.passed, report.problems
            theirs = embeddings(run(consumer, out / "model.onnx", 2)(self.feed))
            found[consumer] = {
                "layers": report.layers,
                "integer_layers": report.integer_layers,
                "saturating_layers": report.saturating_layers,
                "layer_difference": report.layer_difference,
                "model_difference": report.model_difference,
                "allowed": report.allowance,
                "cosine_with_float": cosine(theirs, self.exact),
                "cosine_with_our_quantized_model": cosine(theirs, ours),
                "cpu_time_of_float_over_quantized": {
                    f"{rows} x {tokens} tokens, float {form}": speed(consumer, out, base, rows, tokens, self.feed)
                    for rows, tokens in ((1, 128), (8, 128), (1, 16))
                    for form, base in baselines.items()
                },
            }
        return found


def processor() -> str:
    """Its name, and whether it has instructions that add products of 8 bits in 32."""
    described = environment()["processor"]
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return f"{described}, {'with' if flags & {'avx512_vnni', 'avx_vnni'} else 'without'} VNNI"


def version(package: str) -> str:
    from importlib.metadata import version as of

    return of(package)


def model_output(model: Any, feed: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in feed.items()}).last_hidden_state.numpy()


def embeddings(hidden: Any) -> Any:
    means = hidden.mean(1)
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def cosine(first: Any, second: Any) -> dict[str, float]:
    values = (first * second).sum(-1)
    return {"mean": round(float(values.mean()), 6), "min": round(float(values.min()), 6)}


def run(consumer: str, model: Path | bytes, threads: int) -> Any:
    if consumer == "onnxruntime":
        held = session(model, threads=threads)
        return lambda feed: held.run(None, feed)[0]
    core = openvino.Core()
    source = core.read_model(model if isinstance(model, bytes) else str(model))
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(source, "CPU", settings)
    return lambda feed: compiled(feed)[0]


def speed(consumer: str, out: Path, base: bytes, rows: int, tokens: int, feed: dict[str, Any]) -> dict[str, float]:
    """Ratios of CPU time, one thread: other programs on the machine take wall time, not this."""
    some = {name: value[:rows, :tokens] for name, value in feed.items()}
    held = run(consumer, base, 1), run(consumer, out / "model.onnx", 1)
    ratios = []
    for number in range(-2, PAIRS if rows == 1 else PAIRS // 3):
        spent = []
        for one in held:
            begin = time.process_time()
            one(some)
            spent.append(time.process_time() - begin)
        if number >= 0:
            ratios.append(spent[0] / spent[1])
    return median_interval(ratios)


if __name__ == "__main__":
    main()
