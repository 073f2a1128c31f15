# SPDX-License-Identifier: Apache-2.0
"""How noisy two ways of comparing candidates are: divergence and likelihood, on the same held-out blocks.

`python benchmarks/candidate_noise.py` writes `results/candidate_noise.json`: SmolLM2-135M on Moby-Dick, smoothing with
alpha 0.7, 0.8 and 0.9, seven blocks of 512 tokens; per pair of neighbours the mean difference over blocks and its
standard deviation, in nats per token. Two minutes on two cores.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from assets import fetch
from numpy.typing import NDArray
from quality import LENGTH, blocks_of, book
from results_file import write

from calib.cures import SmoothingSweep, find_pairs
from calib.cures.candidate import Candidate
from calib.cures.judge import Judge, Score
from calib.cures.ranges import smoothed_ranges
from calib.measurement import MeasureOptions, measure
from calib.models import open_model

ALPHAS, BLOCKS = (0.7, 0.8, 0.9), 7


def main() -> None:
    opened = open_model(fetch("smollm2"), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        ids = book(opened, Path(folder))
        calibration = blocks_of(opened, ids, 20_000, 12, Path(folder))
        held_out = blocks_of(opened, ids, 100_000, BLOCKS, Path(folder))
    measured = measure(opened, calibration, MeasureOptions(batch_size=4))
    sweep = SmoothingSweep(find_pairs(opened.model), measured)
    judge = Judge(opened.model, held_out)
    scores: dict[float, Score] = {}
    for alpha in ALPHAS:
        smoothing = sweep.smoothing(alpha)
        ranges = smoothed_ranges(measured, smoothing)
        with Candidate(8, True, measured, ranges, smoothing=smoothing).quantized(opened.model):
            scores[alpha] = judge.judge()
    rows = [compared(a, b, scores[a], scores[b]) for a, b in pairwise(ALPHAS)]
    write("candidate_noise", {"model": "SmolLM2-135M-Instruct", "blocks": BLOCKS, "length": LENGTH, "pairs": rows})


def compared(first: float, second: float, one: Score, other: Score) -> dict[str, Any]:
    assert one.nll is not None
    assert other.nll is not None
    divergence = spread(one.divergence - other.divergence)
    likelihood = spread((one.nll - other.nll).mean(1))
    noisier = likelihood["deviation"] / divergence["deviation"]
    return {"alphas": [first, second], "divergence": divergence, "likelihood": likelihood, "noisier": round(noisier, 2)}


def spread(differences: NDArray[np.float64]) -> dict[str, float]:
    return {"mean": round(float(differences.mean()), 5), "deviation": round(float(differences.std(ddof=1)), 5)}


if __name__ == "__main__":
    main()
