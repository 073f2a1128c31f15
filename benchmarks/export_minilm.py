# SPDX-License-Identifier: Apache-2.0
"""MiniLM as ONNX Q/DQ and as a compressed-tensors checkpoint: what runs in integers, how fast, and how near to float.

`python benchmarks/export_minilm.py` writes `results/export_minilm.json`. Speed is a ratio of CPU time of alternating
runs in the same runtime, one thread: of the float graph as torch exports it, and of the float graph in the form of the
quantized one (`onnx_rows`), against the quantized one. Embeddings are means over tokens of 16 blocks of 128 tokens that
were not calibrated on; their cosine is with those of the float model.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from assets import fetch
from results_file import median_interval, write

from calib.corpus import build_blocks
from calib.export import export_scales, verify_export
from calib.export.onnx_emulate import float_twin, onnx_plan
from calib.export.onnx_graph import float_graph
from calib.export.onnx_lint import session
from calib.export.read_onnx import read_onnx
from calib.measurement.engine import measure
from calib.models import open_model
from calib.quantized import QuantizedModel
from calib.scales import choose_scales

PAIRS = 41


def main() -> None:
    opened = open_model(fetch("minilm"), device="cpu")
    blocks = build_blocks([], opened.tokenizer, samples=64, max_length=128)
    measurement = measure(opened, blocks)
    held_out = build_blocks([], opened.tokenizer, samples=16, max_length=128, seed=7).input_ids
    feed = {"input_ids": held_out, "attention_mask": np.ones_like(held_out)}
    exact = embeddings(model_output(opened.model, feed))
    plain = float_graph(opened).model.SerializeToString()
    results: dict[str, Any] = {}
    for grid, symmetric in (("asymmetric", False), ("symmetric", True)):
        scales = choose_scales(measurement, symmetric=symmetric)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "onnx"
            export_scales(scales, out, opened, to="onnx-qdq")
            read = read_onnx(out / "model.onnx")
            with QuantizedModel(opened.model, onnx_plan(read, opened)):
                ours = embeddings(model_output(opened.model, feed))
            found: dict[str, Any] = {"cosine_of_our_quantized_model": cosine(ours, exact)}
            for consumer in ("onnxruntime", "openvino"):
                report = verify_export(out, consumer, model=opened)
                assert report.passed, report.problems
                assert report.consumer is not None
                theirs = embeddings(run(consumer, out / "model.onnx", 2)(feed))
                baselines = {"as exported": plain, "in the same form": float_twin(read).SerializeToString()}
                found[consumer] = {
                    "layers": report.consumer.layers,
                    "integer_layers": report.consumer.integer_layers,
                    "layer_difference": report.consumer.layer_difference,
                    "model_difference": report.consumer.model_difference,
                    "allowed": report.consumer.allowance,
                    "cosine_with_float": cosine(theirs, exact),
                    "cosine_with_our_quantized_model": cosine(theirs, ours),
                    "cpu_time_of_float_over_quantized": {
                        f"{rows} x {tokens} tokens, float {form}": speed(consumer, out, base, rows, tokens, feed)
                        for rows, tokens in ((1, 128), (8, 128), (1, 16))
                        for form, base in baselines.items()
                    },
                }
            results[f"onnx-qdq {grid}"] = found
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
    write(
        "export_minilm",
        {"onnxruntime": version("onnxruntime"), "openvino": version("openvino"), "onnx": onnx.__version__, **results},
    )


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
