# SPDX-License-Identifier: Apache-2.0
"""The fused CPU kernel: one read of a tensor updates all of its statistics.

The loops are in `read_loops` and `fold_loops`; here is what a site keeps between batches, and how the work is shared.
Threads are Python's own, which run the compiled loops without the interpreter lock: there is no second OpenMP pool
beside torch's, and a later `fork()` (a data loader's workers) is safe. Work is cut in fixed units whose results do
not depend on who computes them, so one thread and many give equal bits.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from calib.kernels import fold_loops, read_loops
from calib.kernels.arena import PAGE, Arena, PagePool
from calib.kernels.plan import RowPlan
from calib.statistics.channels import ChannelStatistics
from calib.statistics.documents import DocumentMaxima
from calib.statistics.fault import Fault
from calib.statistics.histogram import BINS, FloatHistogram
from calib.statistics.observation import GROUPS, Observation
from calib.statistics.peaks import PEAKS, PeakList
from calib.statistics.range import Range
from calib.statistics.site import SiteStatistics
from calib.statistics.summation import FixedPoint, exact_integer

__all__ = ["FusedAccumulator", "FusedKernel"]

_PAGES = BINS // PAGE
_SERIAL_ELEMENTS = {True: 1 << 17, False: 1 << 20}
"""Below this size waking a thread costs more than it saves (about 0.1 ms of work): all statistics, ranges only."""


class FusedKernel:
    """Scratch memory and threads that all sites of one calibration share.

    Args:
        threads: workers including the calling thread.
        full: all statistics, or ranges and document maxima only.
    """

    def __init__(self, threads: int, *, full: bool = True) -> None:
        self.threads = max(1, threads)
        self.full = full
        self._pool: ThreadPoolExecutor | None = None
        self._dense = [np.zeros((GROUPS, BINS), np.int32) for _ in range(self.threads)] if full else []
        self._scratch: dict[str, NDArray[Any]] = {}
        self.arena, self.pool = Arena(), PagePool()
        # machine code is loaded, or compiled, now: what stays of that must not lie between activations
        self.accumulator(1).update(torch.zeros(1, 1, 1), RowPlan.of(Observation.of_shape(1, 1)))

    @property
    def name(self) -> str:
        """What files record."""
        return "fused"

    def accumulator(self, channels: int) -> FusedAccumulator:
        """A new, empty accumulator for one site."""
        return FusedAccumulator(self, channels)

    def close(self) -> None:
        """Ends the threads; they start again when needed."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def scratch(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Uninitialised memory, the same one for all calls that ask for this name."""
        size = math.prod(shape)
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)

    def share(self, work: Any, elements: int) -> int:
        """Calls ``work(first, step)`` for every share of the units, one per thread; returns how many shares."""
        shares = self.threads if elements >= _SERIAL_ELEMENTS[self.full] else 1
        futures: list[Future[None]] = []
        if shares > 1:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads - 1, "calib")
            futures = [self._pool.submit(work, first, shares) for first in range(1, shares)]
        try:
            work(0, shares)
        finally:
            for future in futures:
                future.result()
        return shares


class FusedAccumulator:
    """What one site keeps between batches. `update` is one kernel call; `result` is the statistics so far."""

    def __init__(self, kernel: FusedKernel, channels: int) -> None:
        self._kernel = kernel
        zeros = kernel.arena.zeros
        self._low, self._high = zeros((GROUPS,), np.float32), zeros((GROUPS,), np.float32)
        self._low[:], self._high[:] = np.inf, -np.inf
        self._count, self._nonfinite = zeros((GROUPS,), np.int64), zeros((GROUPS,), np.int64)
        self._total, self._energy = [0] * GROUPS, [0] * GROUPS
        self._fault = Fault()
        self._documents = _DocumentRows(kernel.arena)
        self._channels: tuple[NDArray[Any], ...] = ()
        if kernel.full:
            self._tables = zeros((2, GROUPS, _PAGES), np.int32)  # of values, and of token maxima
            self._tables[:] = -1
            self._peak_bits = zeros((PEAKS,), np.uint32)
            self._peak_place = zeros((PEAKS, 4), np.int64)
            dtypes = (np.float32, np.float32, np.int64, np.int64)  # minimum, maximum, energy high and low
            self._channels = tuple(zeros((GROUPS, channels), dtype) for dtype in dtypes)
            self._channels[0][:], self._channels[1][:] = np.inf, -np.inf
        self._peaks = 0

    def update(self, values: torch.Tensor, plan: RowPlan) -> None:
        """Takes in one batch.

        Args:
            values: floating point ``[blocks, tokens, channels]`` on the CPU, any strides; read in float32.
            plan: the plan of this batch.
        """
        blocks, tokens, channels = values.shape
        flat = values.detach().to(torch.float32).reshape(blocks * tokens, channels).contiguous()
        array = cast(NDArray[np.float32], flat.numpy())
        if plan.units == 0 or channels == 0:
            return
        update = self._update_full if self._kernel.full else self._update_ranges
        if update(array, plan):
            self._fault = self._fault.merge(_fault_of(array, plan))

    def _update_ranges(self, values: NDArray[np.float32], plan: RowPlan) -> bool:
        """Extremes only; returns whether a value is not finite."""
        low, high = np.empty(plan.units, np.int32), np.empty(plan.units, np.int32)
        nonfinite = np.empty(plan.units, np.int64)
        amax = np.empty(plan.segment_group.size, np.float32)
        bits = values.view(np.int32)

        def work(first: int, step: int) -> None:
            read_loops.read_ranges(bits, plan.rows, plan.unit_start, plan.unit_stop, first, step, low, high, nonfinite)

        self._kernel.share(work, values.size)
        fold_loops.fold_keys(plan.segment_group, plan.segment_units, low, high, self._low, self._high, amax)
        return self._count_segments(values.shape[1], plan, nonfinite, amax)

    def _update_full(self, values: NDArray[np.float32], plan: RowPlan) -> bool:
        """All statistics; returns whether a value is not finite."""
        kernel, units, channels = self._kernel, plan.units, values.shape[1]
        bits = values.view(np.uint32)
        total = kernel.scratch("total", (units, channels), np.float64)
        energy = kernel.scratch("energy", (units, channels), np.float64)
        low = kernel.scratch("low", (units, channels), np.float32)
        high = kernel.scratch("high", (units, channels), np.float32)
        bins = kernel.scratch("bins", (kernel.threads, channels), np.uint16)
        row_amax = kernel.scratch("row_amax", (plan.rows.size,), np.uint32)
        nonfinite = np.empty(units, np.int64)

        def work(first: int, step: int) -> None:
            read_loops.read_units(
                values, bits, plan.rows, plan.unit_start, plan.unit_stop, plan.unit_group, first, step,
                kernel._dense[first], bins[first], total, energy, low, high, nonfinite, row_amax,
            )  # fmt: skip

        shares = kernel.share(work, values.size)
        segments = plan.segment_block.size
        segment_total, segment_energy = np.empty(segments), np.empty(segments)
        amax = np.empty(segments, np.float32)
        fold_loops.fold_units(
            plan.segment_group, plan.segment_units, total, energy, low, high, *self._channels,
            segment_total, segment_energy, amax,
        )  # fmt: skip
        groups = plan.segment_group.tolist()
        for group, t, e in zip(groups, segment_total.tolist(), segment_energy.tolist(), strict=True):
            self._total[group] += exact_integer(t)
            self._energy[group] += exact_integer(e)
        any_bad = self._count_segments(channels, plan, nonfinite, amax)
        values_tables, token_tables = self._tables
        pool = kernel.pool
        pool.reserve((shares + 1) * GROUPS * _PAGES)
        for share in range(shares):
            for group in set(groups):
                fold_loops.fold_histogram(kernel._dense[share][group], values_tables[group], pool.pages, pool.used)
        self._peaks = fold_loops.fold_peaks(
            values, bits, plan.rows, plan.places, plan.row_group, row_amax, plan.context.group.shape[1],
            plan.context.document, plan.context.token_id, token_tables, pool.pages, pool.used,
            self._peak_bits, self._peak_place, self._peaks,
        )  # fmt: skip
        return any_bad

    def _count_segments(
        self, channels: int, plan: RowPlan, nonfinite: NDArray[np.int64], amax: NDArray[np.float32]
    ) -> bool:
        """Counts the values of a batch and keeps its document maxima; returns whether a value is not finite."""
        any_bad = fold_loops.fold_counts(
            plan.segment_block, plan.segment_group, plan.segment_units, plan.unit_start, plan.unit_stop,
            nonfinite, channels, amax, self._count, self._nonfinite, self._documents.append(plan),
        )  # fmt: skip
        return bool(any_bad)

    def result(self) -> SiteStatistics:
        """The statistics of all batches so far, a copy."""
        zero = np.float32(0)  # adding it turns -0 into +0
        low, high = self._low + zero, self._high + zero
        channels = None
        if self._channels:
            minimum, maximum, energy_high, energy_low = self._channels
            channels = ChannelStatistics(
                minimum + zero, maximum + zero, FixedPoint(energy_high.copy(), energy_low.copy())
            )
            low, high = channels.minimum.min(axis=1), channels.maximum.max(axis=1)
        total, energy = (self._total[0], self._total[1]), (self._energy[0], self._energy[1])
        span = Range(low, high, self._count.copy(), self._nonfinite.copy(), total, energy)
        documents = self._documents.result()
        if not self._kernel.full:
            return SiteStatistics(span, documents, fault=self._fault)
        used, place = self._peak_bits[: self._peaks], self._peak_place[: self._peaks]
        peaks = PeakList.of(
            used.view(np.float32),
            place[:, 0],
            place[:, 1].astype(np.int32),
            place[:, 2].astype(np.int32),
            place[:, 3],
        )
        histogram, tokens = (self._histogram(tables) for tables in self._tables)
        return SiteStatistics(span, documents, histogram, channels, peaks, tokens, self._fault)

    def _histogram(self, tables: NDArray[np.int32]) -> FloatHistogram:
        """What the pool holds for two page tables, in the bins of `FloatHistogram`: no -0, no overflow."""
        dense = np.zeros((GROUPS, _PAGES, PAGE), np.int64)
        held = tables >= 0
        dense[held] = self._kernel.pool.pages[tables[held]]
        counts = dense.reshape(GROUPS, BINS)
        for infinity in (0x7F80, 0xFF80):
            counts[:, infinity - 1] += counts[:, infinity]
            counts[:, infinity] = 0
        counts[:, 0] += counts[:, 0x8000]
        counts[:, 0x8000] = 0
        return FloatHistogram.from_dense(counts)


def _fault_of(values: NDArray[np.float32], plan: RowPlan) -> Fault:
    """The first non-finite value of rows ``[rows, channels]``."""
    row, channel = np.nonzero(~np.isfinite(values[plan.rows]))
    block, position = np.divmod(plan.places[row], plan.context.group.shape[1])
    document = plan.context.document[block]
    first = np.lexsort((channel, position, document))[0]
    return Fault((int(document[first]), int(position[first]), int(channel[first])))


class _DocumentRows:
    """Document maxima as they come, one row per block, in an array that doubles."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._amax = arena.zeros((16, GROUPS), np.float32)
        self._used = 0
        self._plans: list[RowPlan] = []

    def append(self, plan: RowPlan) -> NDArray[np.float32]:
        """Rows float32 ``[blocks, 2]`` for the documents of a batch, all NaN, to be filled."""
        blocks = plan.context.document.size
        if self._used + blocks > self._amax.shape[0]:
            grown = self._arena.zeros((2 * max(self._amax.shape[0], blocks), GROUPS), np.float32)
            grown[: self._used] = self._amax[: self._used]
            self._amax = grown
        rows = self._amax[self._used : self._used + blocks]
        rows[:] = np.nan
        self._used += blocks
        self._plans.append(plan)
        return rows

    def result(self) -> DocumentMaxima:
        """All rows, one per document."""
        if not self._plans:
            return DocumentMaxima.empty()
        return DocumentMaxima.of(
            np.concatenate([plan.context.document for plan in self._plans]),
            np.concatenate([plan.context.domain for plan in self._plans]),
            self._amax[: self._used] + np.float32(0),
        )
