# SPDX-License-Identifier: Apache-2.0
"""Every kernel computes the definition, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calib.kernels import fused, make_kernel
from calib.kernels.plan import RowPlan
from calib.statistics import Observation, SiteStatistics

RANGES = ("range.minimum", "range.maximum", "range.count", "range.nonfinite")
SPECIAL = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 9.0, -9.0])


def batch(seed: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, Observation]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    special = torch.rand(shape, generator=generator) < 0.1
    values[special] = SPECIAL[torch.randint(0, len(SPECIAL), (int(special.sum()),), generator=generator)]
    rng = np.random.default_rng(seed)
    context = Observation.of_tokens(
        rng.integers(0, 99, shape[:2]), document=rng.integers(0, 3, shape[0]), valid=rng.random(shape[:2]) < 0.8
    )
    return values.to(dtype), context


def check(name: str, threads: int, full: bool, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    kernel = make_kernel(name, device=device, full=full, threads=threads)
    accumulator, expected = kernel.accumulator(shape[2]), None
    for seed in range(2):
        values, context = batch(seed, shape, dtype)
        accumulator.update(values.to(device), RowPlan.of(context))
        one = SiteStatistics.observe(values.float().numpy(), context)
        expected = one if expected is None else expected.merge(one)
    assert expected is not None
    got, want = accumulator.result().to_tensors(), expected.to_tensors()
    kernel.close()
    if full:
        assert got.keys() == want.keys()
    exact = want if full else [k for k in want if k in RANGES or k.startswith(("documents.", "fault."))]
    for key in exact:
        assert got[key].tobytes() == want[key].tobytes(), key


@pytest.mark.parametrize("serial", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 300, 33)])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("name", "threads"), [("torch", 1), ("fused", 1), ("fused", 2)])
def test_kernels_compute_the_definition(
    name: str,
    threads: int,
    full: bool,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    serial: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if serial is not None:
        monkeypatch.setattr(fused, "_SERIAL_ELEMENTS", {True: serial, False: serial})
    check(name, threads, full, shape, dtype, "cpu")


@pytest.mark.parametrize("blocks", [3, 9, 40])
@pytest.mark.parametrize("magnitude", [2.0**30, 1.5 * 2.0**33, 3e38])
@pytest.mark.parametrize("name", ["torch", "fused"])
def test_energies_beyond_the_fixed_point_saturate_alike(name: str, magnitude: float, blocks: int) -> None:
    values = torch.full((blocks, 6, 2), magnitude)
    values[..., 1] = 1.0
    context = Observation.of_shape(blocks, 6)
    accumulator = make_kernel(name).accumulator(2)
    for _ in range(2):
        accumulator.update(values, RowPlan.of(context))
    one = SiteStatistics.observe(values.numpy(), context)
    got, want = accumulator.result().channels, one.merge(one).channels
    assert got is not None
    assert want is not None
    assert got.energy.high.tolist() == want.energy.high.tolist()
    assert got.energy.low.tolist() == want.energy.low.tolist()
    exact = 2 * blocks * 6 * magnitude**2
    assert got.sum_of_squares[0].tolist() == [exact if exact < 2.0**69 else math.inf, 2.0 * blocks * 6]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full", [True, False])
def test_the_torch_kernel_on_cuda_computes_the_definition(full: bool, dtype: torch.dtype) -> None:
    check("torch", 1, full, (2, 300, 33), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "full"), [("torch", True), ("torch", False), ("fused", True), ("fused", False)])
def test_some_tokens_in_any_order_measure_as_the_same_tokens_in_their_places(
    name: str, full: bool, dtype: torch.dtype
) -> None:
    """The rows that a router sends to one expert; what it does not send must not count."""
    accumulator, expected = make_kernel(name, full=full).accumulator(5), None
    for seed in range(3):
        values, context = batch(seed, (4, 40, 5), dtype)
        place = np.random.default_rng(seed).permutation(160)[: 30 * (seed + 1)].astype(np.int64)
        routed = values.reshape(1, 160, 5)[:, torch.from_numpy(place)]
        accumulator.update(routed, RowPlan.routed(context, place))
        group = np.full(160, 255, np.uint8)
        group[place] = context.group.ravel()[place]
        only = Observation(group.reshape(4, 40), context.document, context.domain, context.token_id)
        one = SiteStatistics.observe(values.float().numpy(), only)
        expected = one if expected is None else expected.merge(one)
    assert expected is not None
    got, want = accumulator.result().to_tensors(), expected.to_tensors()
    for key in want if full else (*RANGES, "fault.place", "documents.amax"):
        assert got[key].tobytes() == want[key].tobytes(), key


def test_a_place_may_lie_beyond_32_bits() -> None:
    """Equal magnitudes are told apart by their place, also among 5e9 values."""
    from calib.kernels.top import _first

    place = torch.tensor([2**40 + 3, 2**33, 2**40, 7, 2**40 + 1])
    magnitude = torch.tensor([5, 9, 5, 1, 5], dtype=torch.int32)
    assert sorted(_first(magnitude, place, 3).tolist()) == [1, 2, 4]
    assert sorted(_first(magnitude, place, 4).tolist()) == [0, 1, 2, 4]
