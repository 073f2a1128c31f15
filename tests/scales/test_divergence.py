# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from calib.scales import Grid, kl_divergence
from calib.scales.divergence import divergences
from calib.scales.error import sides
from calib.scales.magnitudes import Magnitudes


def literal(parts: list[tuple[Magnitudes, int]], scale: float) -> float:
    """The definition in the module docstring, word by word, bin by bin."""
    p, q = [], []
    for side, limit in parts:
        if not side.value.size:
            continue
        inside = side.value <= (limit + 0.5) * scale
        bins = []
        for k in range(8):
            joined = (side.value > k * scale / 16) & (side.value <= (k + 1) * scale / 16)
            if joined.any():
                bins.append((0.0, side.count[joined].sum(), scale / 16))
        for i in np.flatnonzero(inside & (side.value > scale / 2)):
            level = max(1, math.ceil(side.value[i] / scale - 0.5))
            bins.append((level if level <= 128 else 1000.0 + i, side.count[i], side.width[i]))
        levels, counts, widths = (np.array(column) for column in zip(*bins, strict=True))
        shared = np.zeros(counts.size)
        for level in np.unique(levels):
            cell = levels == level
            shared[cell] = counts[cell].sum() * widths[cell] / widths[cell].sum()
        q.append(shared)
        counts[-1] += side.count[~inside].sum()
        p.append(counts)
    one, other = np.concatenate(p), np.concatenate(q)
    return float((one / one.sum() * np.log((one / one.sum()) / (other / other.sum()))).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "spiked", "relu", "uniform"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_divergence_is_what_the_docstring_says(lab: Any, kind: str, symmetric: bool) -> None:
    d = lab.distribution(lab.values(kind, 50_000), "bfloat16")
    for bits in (2, 4, 8, 12):
        grid = Grid(bits, symmetric)
        for clip in (1.0, 0.5, 0.05):
            step = grid.step(d.minimum * clip, d.maximum * clip)
            assert step is not None
            arguments = (step.zero_point, grid.qmin, grid.qmax)
            assert kl_divergence(d, step.scale, *arguments) == pytest.approx(
                literal(sides(d, *arguments), step.scale), rel=1e-6, abs=1e-10
            )


def test_a_grid_with_a_level_for_every_value_diverges_by_nothing(lab: Any) -> None:
    d = lab.distribution(np.arange(-100, 101, dtype=np.float32), "bfloat16")
    assert kl_divergence(d, 1.0) == pytest.approx(0, abs=1e-12)


def test_fewer_bits_diverge_more(lab: Any) -> None:
    d = lab.distribution(lab.values("normal"), "bfloat16")
    found = [kl_divergence(d, d.amax / Grid(bits).qmax, 0, Grid(bits).qmin, Grid(bits).qmax) for bits in (2, 4, 6, 8)]
    assert found == sorted(found, reverse=True)


def test_zeros_alone_diverge_by_nothing(lab: Any) -> None:
    assert kl_divergence(lab.distribution(np.zeros(5, np.float32)), 1.0) == 0


def test_a_grid_below_all_values_diverges_without_end(lab: Any) -> None:
    d = lab.distribution(np.array([100.0, 101.0], np.float32), "bfloat16")
    assert kl_divergence(d, 1e-3) == math.inf


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("limit", [0.0, 1.0, 127.0])
def test_a_grid_any_distance_below_the_values_diverges_without_end_and_without_a_warning(
    lab: Any, limit: float
) -> None:
    side = lab.distribution(np.array([1.0, 2.0, 3e38], np.float32)).folded
    scales = np.array([1e-45, 1e-20, 1e-3])
    assert (divergences([(side, np.full(3, limit))], scales) == math.inf).all()


def test_many_grids_at_once_equal_one_at_a_time(lab: Any) -> None:
    d = lab.distribution(lab.values("heavy-tailed"), "bfloat16")
    scales = np.geomspace(0.01, 1, 9)
    together = divergences([(d.folded, np.full(9, 127.0))], scales)
    np.testing.assert_allclose(together, [kl_divergence(d, float(s)) for s in scales], rtol=1e-12)
