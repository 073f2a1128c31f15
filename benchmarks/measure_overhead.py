# SPDX-License-Identifier: Apache-2.0
"""Cost of measuring, as a paired ratio to the plain forward pass: no hooks, no language-model head, no cache.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/measure_overhead.py             # SmolLM2 and MiniLM on the CPU
    python benchmarks/measure_overhead.py --device cuda                       # a Llama-shaped model, random weights

Plain and measured passes alternate in one process. CPU figures are process CPU time, all threads; on a GPU they are
event times. A probe of 16 tokens, which finds aliases, comes first, as in `calib measure`. Memory is the peak of
resident memory (or of the CUDA allocator) above that of plain passes; on the CPU each figure has a process of its own,
because memory that one case freed would hide what the next one takes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from results_file import median_interval, write

from calib.measurement.calibration import Calibration
from calib.measurement.head import takes_cache, without_head


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Peak resident memory while the block runs, sampled every 5 ms; of the CUDA allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.stop = threading.Event()
            self.peak = resident()
            self.thread = threading.Thread(target=self._sample)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def compare(model: torch.nn.Module, ids: torch.Tensor, pairs: int, statistics: str, kernel: str) -> dict[str, Any]:
    device = ids.device
    inputs: dict[str, Any] = {"input_ids": ids}
    if takes_cache(model):
        inputs["use_cache"] = False
    calibration = Calibration(model, statistics=statistics, kernel=kernel)

    def run(context: Any) -> tuple[float, float, int]:
        with torch.no_grad(), without_head(model), context, PeakMemory(device) as memory:
            wall, begin = time.perf_counter(), clock(device)
            model(**inputs)
            return clock(device) - begin, time.perf_counter() - wall, memory.peak

    run(nullcontext())
    plain_memory = max(run(nullcontext())[2] for _ in range(3))
    with torch.no_grad(), without_head(model), calibration, calibration.probe():
        model(**{**inputs, "input_ids": ids[:1, :16]})
    measured_memory = max(run(calibration)[2] for _ in range(2))
    ratios, walls, plains, measureds = [], [], [], []
    for pair in range(pairs):
        contexts = [nullcontext(), calibration] if pair % 2 == 0 else [calibration, nullcontext()]
        times = {id(c): run(c) for c in contexts}
        plain, measured = (times[id(c)] for c in sorted(contexts, key=lambda c: c is calibration))
        plains.append(plain[0])
        measureds.append(measured[0])
        ratios.append(measured[0] / plain[0])
        walls.append(measured[1] / plain[1])
    return {
        "statistics": statistics,
        "kernel": calibration.kernel_name,
        "tensors": len(calibration.sites()),
        "ports": len(calibration.ports),
        "pairs": pairs,
        "ratio": median_interval(ratios),
        "wall_ratio": median_interval(walls),
        "plain_seconds": median_interval(plains),
        "measured_seconds": median_interval(measureds),
        "extra_memory_mb": round((measured_memory - plain_memory) / 1e6, 1),
        "ratios": [round(r, 4) for r in ratios],
    }


def peak_memory(model: torch.nn.Module, ids: torch.Tensor, statistics: str) -> int:
    """Peak resident memory of five passes in this process; ``plain`` measures nothing."""
    inputs: dict[str, Any] = {"use_cache": False} if takes_cache(model) else {}
    context: Any = nullcontext() if statistics == "plain" else Calibration(model, statistics=statistics)
    with torch.no_grad(), without_head(model), context, PeakMemory(ids.device) as memory:
        if statistics != "plain":
            with context.probe():
                model(input_ids=ids[:1, :16], **inputs)
        for _ in range(5):
            model(input_ids=ids, **inputs)
    return memory.peak


def extra_memory(name: str, statistics: str, arguments: argparse.Namespace) -> float:
    """Megabytes above plain passes, each in a process of its own."""
    peaks = []
    for what in (statistics, "plain"):
        command = [sys.executable, __file__, "--memory", name, what, "--batch-size", str(arguments.batch_size),
                   "--max-length", str(arguments.max_length)]  # fmt: skip
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    return round((peaks[0] - peaks[1]) / 1e6, 1)


def llama_shaped(layers: int, hidden: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=int(hidden * 8 / 3) // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), vocab_size=32000,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def cpu_models(names: list[str]) -> dict[str, torch.nn.Module]:
    from assets import fetch

    from calib.models import open_model

    return {name: open_model(fetch(name), device="cpu").model for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", default=["smollm2", "minilm"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"], help="with --device cuda")
    parser.add_argument("--layers", type=int, default=16, help="with --device cuda")
    parser.add_argument("--hidden", type=int, default=2048, help="with --device cuda")
    parser.add_argument("--statistics", nargs="*", default=["full", "ranges"])
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "STATISTICS"), help="print peak memory in bytes, stop")
    parser.add_argument("--output", default=None, help="name of the result file; nothing is written with '-'")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.memory:
        model = cpu_models(arguments.memory[:1])[arguments.memory[0]]
        ids = torch.randint(5, model.config.vocab_size, (arguments.batch_size, arguments.max_length))
        print(peak_memory(model, ids, arguments.memory[1]))
        return
    figures: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    if device.type == "cuda":
        cases = {f"llama-shaped-{t}": llama_shaped(arguments.layers, arguments.hidden).to(device, getattr(torch, t))
                 for t in arguments.dtypes}  # fmt: skip
    else:
        cases = cpu_models(arguments.models)
    for name, model in cases.items():
        shape = (arguments.batch_size, arguments.max_length)
        ids = torch.randint(5, model.config.vocab_size, shape, generator=generator).to(device)
        for statistics in arguments.statistics:
            result = compare(model, ids, arguments.pairs, statistics, "auto")
            if device.type == "cpu":
                result["extra_memory_mb"] = extra_memory(name, statistics, arguments)
            figures[f"{name}/{statistics}"] = result
            print(name, json.dumps({k: v for k, v in result.items() if k != "ratios"}))
    if arguments.output != "-":
        device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        shape_text = f"{arguments.batch_size} x {arguments.max_length} tokens"
        print(write(arguments.output or f"measure_overhead_{device.type}",
                    {"device": device_name, "batch": shape_text, "figures": figures}))  # fmt: skip


if __name__ == "__main__":
    main()
