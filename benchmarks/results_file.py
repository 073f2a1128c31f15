# SPDX-License-Identifier: Apache-2.0
"""What every benchmark writes beside its figures: the command, the versions, the processor, the date."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Where and with what a figure was taken."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "numba", "safetensors", "compressed-tensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *(Path(a).name if a.startswith("/") else a for a in sys.argv)]),
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def median_interval(values: list[float], *, share: float = 0.9, draws: int = 10_000) -> dict[str, float]:
    """Median with a bootstrap interval (seed 0), smallest and largest."""
    array = np.array(values)
    picks = np.random.default_rng(0).integers(0, array.size, (draws, array.size))
    medians = np.median(array[picks], axis=1)
    low, high = np.quantile(medians, [(1 - share) / 2, (1 + share) / 2])
    return {
        "median": round(float(np.median(array)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "min": round(float(array.min()), 4),
        "max": round(float(array.max()), 4),
        "n": int(array.size),
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Writes `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(), **figures}, indent=1) + "\n")
    return path
