# SPDX-License-Identifier: Apache-2.0
"""Where ONNX Runtime spends its time in MiniLM, by operator: float as torch exports it, and quantized.

`python benchmarks/export_minilm_profile.py` writes `results/export_minilm_profile.json`: milliseconds per pass of 128
tokens, one thread, medians over passes of the sum of each operator's kernels, by ONNX Runtime's own profiler.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from assets import fetch
from results_file import write

from calib.corpus import build_blocks
from calib.export import export_scales
from calib.export.onnx_graph import float_graph, save_onnx
from calib.measurement.engine import measure
from calib.models import open_model
from calib.scales import choose_scales

PASSES = 40


def main() -> None:
    opened = open_model(fetch("minilm"), device="cpu")
    blocks = build_blocks([], opened.tokenizer, samples=8, max_length=128)
    scales = choose_scales(measure(opened, blocks), symmetric=False)
    ids = blocks.input_ids[:1].astype(np.int64)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_onnx(float_graph(opened).model, folder / "float.onnx")
        export_scales(scales, folder / "int8", opened, to="onnx-qdq")
        graphs = {"float": folder / "float.onnx", "quantized": folder / "int8" / "model.onnx"}
        found = {name: profile(path, ids, folder) for name, path in graphs.items()}
    write("export_minilm_profile", {"onnxruntime": onnxruntime.__version__, "passes": PASSES, **found})


def profile(path: Path, ids: Any, folder: Path) -> dict[str, Any]:
    """Operators, the slowest first: how many, and milliseconds per pass."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / path.parent.name)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(PASSES):
        session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[str, list[float]] = {}
    nodes: dict[str, dict[str, list[float]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times = nodes.setdefault(event["args"]["op_name"], {}).setdefault(event["name"], [])
            times.append(event["dur"] / 1000)
    for operator, held in nodes.items():
        spent[operator] = [len(held), sum(float(np.median(times)) for times in held.values())]
    ordered = sorted(spent.items(), key=lambda item: -item[1][1])
    return {
        "total_ms": round(sum(ms for _, ms in spent.values()), 3),
        "operators": {name: {"nodes": int(count), "ms": round(ms, 3)} for name, (count, ms) in ordered},
    }


if __name__ == "__main__":
    main()
