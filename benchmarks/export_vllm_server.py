# SPDX-License-Identifier: Apache-2.0
"""The OpenAI endpoint of vLLM answers from a static INT8 checkpoint of SmolLM2.

`python benchmarks/export_vllm_server.py` writes `results/export_vllm_server.json`; it needs `make consumer-vllm`.
Layers whose inputs break static INT8 in this model (`*.down_proj`) stay in float. Scales are asymmetric: these vLLM
uses as they are written on every CPU, symmetric ones not where there is AMX.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from assets import fetch
from results_file import write

from calib.corpus import build_blocks
from calib.export import export_scales, verify_export
from calib.measurement.engine import measure
from calib.models import open_model
from calib.scales import choose_scales

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".consumers" / "vllm" / "bin" / "python"
PROMPT = "The capital of France is"


def main() -> None:
    opened = open_model(fetch("smollm2"), device="cpu", dtype="float32")
    measurement = measure(opened, build_blocks([], opened.tokenizer, samples=16, max_length=128))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "smollm2-int8"
        scales = choose_scales(measurement, ignore=["*.down_proj:input"], symmetric=False)
        summary = export_scales(scales, out, opened, to="compressed-tensors")
        assert verify_export(out, run=False).passed
        write("export_vllm_server", {"layers": len(summary.quantized), **answer(out)})


def answer(folder: Path) -> dict[str, Any]:
    """What the endpoint says to a prompt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "512", "--port", str(port), "--served-model-name", "int8"),
    ]
    server = subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        begin = time.monotonic()
        while not reachable(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() - begin > 600:
                raise SystemExit("the server did not start")
            time.sleep(2)
        body = {"model": "int8", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            content = json.load(response)
        return {"prompt": PROMPT, "answer": content["choices"][0]["text"], "usage": content["usage"]}
    finally:
        server.terminate()
        server.wait(60)


def reachable(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
