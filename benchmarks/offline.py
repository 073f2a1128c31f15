# SPDX-License-Identifier: Apache-2.0
"""What a measurement answers without the model: how fast a hundred settings are, and whether the expected errors hold.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/offline.py

SmolLM2-135M measured on 12 x 512 tokens of Moby-Dick. Settings, for all inputs of linear layers: method x bits x
symmetry (30), and smoothing by 35 alphas, the ranges of each at two widths (70); each gives a scale file with expected
errors. Errors: what the scale file expects beside what the running model shows, per tensor, on the calibration text
itself and on text that no range comes from.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from assets import fetch
from quality import blocks_of, book
from results_file import median_interval, write

from calib.corpus import TokenBlocks
from calib.cures import SmoothingSweep, find_pairs
from calib.cures.ranges import smoothed_ranges
from calib.evaluation.layers import LARGEST_DIFFERENCE_DB, layer_errors
from calib.measurement import Measurement, MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import WeightScheme, plan_from_scales
from calib.quantized.grid import IntegerGrid
from calib.scales import choose_scales

METHODS = ("absmax", "percentile:99.9", "percentile:99.99", "mse", "entropy")
ALPHAS = np.linspace(0.1, 0.95, 35)
INPUTS = ("linear_input",)
REPEATS = 3


def main() -> None:
    opened = open_model(fetch("smollm2"), device="cpu")
    with TemporaryDirectory() as folder:
        ids = book(opened, Path(folder))
        calibration = blocks_of(opened, ids, 20_000, 12, Path(folder))
        other = blocks_of(opened, ids, 200_000, 2, Path(folder))
    measurement = measure(opened, calibration, MeasureOptions(batch_size=4))
    write(
        "offline",
        {
            "model": "SmolLM2-135M-Instruct (dequantized from Q4_1)",
            "tensors": len(measurement.sites) + len(measurement.weights),
            "sweep": _sweep(opened, measurement),
            "expected_and_measured_errors": {
                "calibration text": _errors(opened, measurement, calibration.select(range(2))),
                "other text": _errors(opened, measurement, other),
            },
        },
    )


def _sweep(opened: OpenedModel, measurement: Measurement) -> dict[str, Any]:
    """Seconds for all settings; finding the pairs, which runs the model, comes before."""
    pairs = find_pairs(opened.model)
    settings = list(itertools.product(METHODS, (8, 6, 4), (True, False)))
    wall, cpu = [], []
    for _ in range(REPEATS):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        files = [
            choose_scales(measurement, method=method, bits=bits, symmetric=symmetric, sites=INPUTS)
            for method, bits, symmetric in settings
        ]
        sweep = SmoothingSweep(pairs, measurement)
        for alpha, bits in itertools.product(ALPHAS, (8, 4)):
            ranges = smoothed_ranges(measurement, sweep.smoothing(float(alpha)))
            files.append(choose_scales(ranges, bits=bits, sites=INPUTS))
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return {
        "settings": len(files),
        "target_seconds": 20,
        "wall_seconds": median_interval(wall),
        "cpu_seconds": median_interval(cpu),
    }


def _errors(opened: OpenedModel, measurement: Measurement, blocks: TokenBlocks) -> dict[str, Any]:
    scales = choose_scales(measurement)
    plan = plan_from_scales(opened.model, scales, weights=WeightScheme(IntegerGrid.of(8)))
    batches = [{"input_ids": torch.from_numpy(blocks.input_ids[row : row + 1])} for row in range(len(blocks))]
    found = layer_errors(opened.model, batches, plan, scales=scales)
    differences = [abs(d) for t in found.tensors.values() if (d := t.difference_db) is not None]
    return {
        "target_median_db": LARGEST_DIFFERENCE_DB,
        "absolute_difference_db": median_interval(differences),
        "further_than_0.5_db": [
            {"tensor": t.name, "measured_minus_expected_db": round(float(t.difference_db or 0), 3)}
            for t in found.disagreements()
        ],
    }


if __name__ == "__main__":
    main()
