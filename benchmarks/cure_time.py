# SPDX-License-Identifier: Apache-2.0
"""How long `calib quantize --cure auto` takes for SmolLM2-135M on Moby-Dick, from the shell to the verified checkpoint.

`OMP_WAIT_POLICY=PASSIVE python benchmarks/cure_time.py` writes `results/cure_time.json`; it needs a quiet machine. With
48 blocks of 512 tokens for the ranges, and with 128, which is the default; 16 more are held out. Measuring is the pass
over all blocks for the ranges that every cured model gets in the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from assets import fetch
from results_file import write

SAMPLES = (48, 128)


def main() -> None:
    model, text = fetch("smollm2"), fetch("moby-dick") / "data.txt"
    results: dict[str, Any] = {}
    for samples in SAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "int8"
            command = ["quantize", str(model), "--cure", "auto", "--samples", str(samples), "-d", str(text)]
            quantizing = seconds(*command, "-o", str(out))
            verifying = seconds("verify", str(out), "-q")
            cures = json.loads((out / "cures.json").read_text())
        last = cures["rows"][-1]
        results[f"{samples} samples"] = {
            "seconds": round(quantizing, 1),
            "calib_verify_seconds": round(verifying, 1),
            "measuring_seconds": round(cures["measuring_seconds"], 1),
            "seconds_over_measuring": round(quantizing / cures["measuring_seconds"], 2),
            "chosen": cures["chosen"],
            "verified": last["ratio"],
            "steps": {row["name"]: row["seconds"] for row in cures["rows"]},
        }
        write("cure_time", results)


def seconds(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "calib", *command], check=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
