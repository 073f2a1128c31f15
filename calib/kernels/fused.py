# SPDX-License-Identifier: Apache-2.0
"""The fused CPU kernel: one read of a tensor updates all of its statistics.

The loops are in `fused_loops`; here is what a site keeps between batches, and how the work is shared by threads.
Threads are Python's own, which run the compiled loops without the interpreter lock: there is no second OpenMP pool
beside torch's, and a later `fork()` (a data loader's workers) is safe. Work is cut in fixed units whose results do
not depend on who computes them, so one thread and many give equal bits.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from calib.kernels import fused_loops as loops
from calib.kernels.plan import RowPlan
from calib.statistics.channels import ChannelStatistics
from calib.statistics.documents import DocumentMaxima
from calib.statistics.fault import Fault
from calib.statistics.histogram import BINS, FloatHistogram
from calib.statistics.observation import GROUPS, SINK
from calib.statistics.peaks import PEAKS, PeakList
from calib.statistics.range import Range
from calib.statistics.site import SiteStatistics
from calib.statistics.summation import FixedPoint, exact_integer

__all__ = ["FusedAccumulator", "FusedKernel"]

_PAGE = 128
_PAGES = BINS // _PAGE
_SERIAL_ELEMENTS = 1 << 17
"""Below this size waking a thread costs more than it saves (about 0.1 ms of work)."""


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

    @property
    def name(self) -> str:
        """What files record."""
        return "fused"

    def accumulator(self) -> FusedAccumulator:
        """A new, empty accumulator for one site."""
        return FusedAccumulator(self)

    def close(self) -> None:
        """Ends the threads; they start again when needed."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def scratch(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Uninitialised memory, the same one for all calls that ask for this name."""
        size = int(np.prod(shape))
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)

    def share(self, work: Any, elements: int) -> int:
        """Calls ``work(first, step)`` for every share of the units, one per thread; returns how many shares."""
        shares = self.threads if elements >= _SERIAL_ELEMENTS else 1
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

    def __init__(self, kernel: FusedKernel) -> None:
        self._kernel = kernel
        self._range = Range.empty()
        self._fault = Fault()
        self._documents: list[DocumentMaxima] = []
        self._channels: tuple[NDArray[Any], ...] | None = None
        self._pages = [_Pages(), _Pages()]
        self._token_pages = [_Pages(), _Pages()]
        self._peak_bits = np.zeros(PEAKS, np.uint32)
        self._peak_place = np.zeros((PEAKS, 4), np.int64)
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
        nonfinite = update(array, plan)
        if nonfinite.any():
            self._fault = self._fault.merge(Fault.observe(array.reshape(values.shape), plan.context))

    def _update_ranges(self, values: NDArray[np.float32], plan: RowPlan) -> NDArray[np.int64]:
        low, high = np.empty(plan.units, np.int32), np.empty(plan.units, np.int32)
        nonfinite = np.empty(plan.units, np.int64)
        bits = values.view(np.int32)

        def work(first: int, step: int) -> None:
            loops.read_ranges(bits, plan.rows, plan.unit_start, plan.unit_stop, first, step, low, high, nonfinite)

        self._kernel.share(work, values.size)
        starts = plan.segment_units[:-1]
        smallest, largest = (
            (key ^ ((key >> 31) & 0x7FFFFFFF)).view(np.float32)
            for key in (np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts))
        )
        amax = np.maximum(np.maximum(largest, -smallest), np.float32(0))
        self._take_segments(values.shape[1], plan, nonfinite, amax, None, None)
        self._take_extremes(smallest, largest, plan.segment_group)
        return nonfinite

    def _update_full(self, values: NDArray[np.float32], plan: RowPlan) -> NDArray[np.int64]:
        kernel, units, channels = self._kernel, plan.units, values.shape[1]
        bits = values.view(np.uint32)
        total = kernel.scratch("total", (units, channels), np.float64)
        energy = kernel.scratch("energy", (units, channels), np.float64)
        low = kernel.scratch("low", (units, channels), np.float32)
        high = kernel.scratch("high", (units, channels), np.float32)
        bins = kernel.scratch("bins", (kernel.threads, channels), np.uint16)
        row_amax = kernel.scratch("row_amax", (plan.rows.size,), np.uint32)
        nonfinite = np.empty(units, np.int64)
        unit_group = np.repeat(plan.segment_group, np.diff(plan.segment_units))

        def work(first: int, step: int) -> None:
            loops.read_units(
                values, bits, plan.rows, plan.unit_start, plan.unit_stop, unit_group, first, step,
                kernel._dense[first], bins[first], total, energy, low, high, nonfinite, row_amax,
            )  # fmt: skip

        shares = kernel.share(work, values.size)
        segments = plan.segment_block.size
        segment_total, segment_energy = np.empty(segments), np.empty(segments)
        amax = np.empty(segments, np.float32)
        if self._channels is None:
            empty = ChannelStatistics.empty(channels)
            self._channels = (empty.minimum, empty.maximum, empty.energy.high, empty.energy.low)
        loops.fold_units(
            plan.segment_group, plan.segment_units, total, energy, low, high, *self._channels,
            segment_total, segment_energy, amax,
        )  # fmt: skip
        self._take_segments(channels, plan, nonfinite, amax, segment_total, segment_energy)
        for share in range(shares):
            for group, pages in enumerate(self._pages):
                if group != SINK or (plan.segment_group == SINK).any():
                    pages.fold(kernel._dense[share][group])
        rest, sink = self._token_pages
        rest.pages, sink.pages, self._peaks = loops.fold_peaks(
            values, bits, plan.rows, plan.row_group, row_amax, plan.context.group.shape[1],
            plan.context.document, plan.context.token_id,
            rest.table, sink.table, rest.pages, sink.pages, rest.used, sink.used,
            self._peak_bits, self._peak_place, self._peaks,
        )  # fmt: skip
        return nonfinite

    def _take_segments(
        self,
        channels: int,
        plan: RowPlan,
        unit_nonfinite: NDArray[np.int64],
        amax: NDArray[np.float32],
        total: NDArray[np.float64] | None,
        energy: NDArray[np.float64] | None,
    ) -> None:
        """Adds the per-segment numbers of a batch to the range and the document maxima."""
        starts = plan.segment_units[:-1]
        nonfinite = np.add.reduceat(unit_nonfinite, starts)
        rows = np.add.reduceat(plan.unit_stop - plan.unit_start, starts)
        count = rows * channels - nonfinite
        exact_total, exact_energy = [0] * GROUPS, [0] * GROUPS
        if total is not None and energy is not None:
            for group, t, e in zip(plan.segment_group, total, energy, strict=True):
                exact_total[group] += exact_integer(float(t))
                exact_energy[group] += exact_integer(float(e))
        counts, bad = np.zeros(GROUPS, np.int64), np.zeros(GROUPS, np.int64)
        np.add.at(counts, plan.segment_group, count)
        np.add.at(bad, plan.segment_group, nonfinite)
        empty = Range.empty()
        self._range = self._range.merge(
            Range(
                empty.minimum,
                empty.maximum,
                counts,
                bad,
                (exact_total[0], exact_total[1]),
                (exact_energy[0], exact_energy[1]),
            )
        )
        maxima = np.full((plan.context.document.size, GROUPS), np.nan, np.float32)
        maxima[plan.segment_block, plan.segment_group] = np.where(count > 0, amax, np.nan)
        self._documents.append(DocumentMaxima(plan.context.document, plan.context.domain, maxima))

    def _take_extremes(self, low: NDArray[np.float32], high: NDArray[np.float32], group: NDArray[np.int64]) -> None:
        np.minimum.at(self._range.minimum, group, low)
        np.maximum.at(self._range.maximum, group, high)

    def result(self) -> SiteStatistics:
        """The statistics of all batches so far, a copy."""
        zero = np.float32(0)  # adding it turns -0 into +0
        documents = _joined(self._documents)
        if not self._kernel.full or self._channels is None:
            base = self._range
            return SiteStatistics(
                Range(base.minimum + zero, base.maximum + zero, base.count, base.nonfinite, base.total, base.energy),
                documents,
                fault=self._fault,
            )
        low, high, energy_high, energy_low = (array.copy() for array in self._channels)
        used = self._peak_bits[: self._peaks]
        place = self._peak_place[: self._peaks]
        return SiteStatistics(
            Range(
                low.min(axis=1) + zero,
                high.max(axis=1) + zero,
                self._range.count,
                self._range.nonfinite,
                self._range.total,
                self._range.energy,
            ),
            documents,
            FloatHistogram.from_dense(np.stack([pages.dense() for pages in self._pages])),
            ChannelStatistics(low + zero, high + zero, FixedPoint(energy_high, energy_low)),
            PeakList.of(
                used.view(np.float32),
                place[:, 0],
                place[:, 1].astype(np.int32),
                place[:, 2].astype(np.int32),
                place[:, 3],
            ),
            FloatHistogram.from_dense(np.stack([pages.dense() for pages in self._token_pages])),
            self._fault,
        )


class _Pages:
    """Counts of 65,536 bins, held in pages of 128 bins (one sign and exponent) that exist only if touched."""

    def __init__(self) -> None:
        self.table = np.full(_PAGES, -1, np.int32)
        self.pages = np.zeros((0, _PAGE), np.int64)
        self.used = np.zeros(1, np.int64)

    def fold(self, dense: NDArray[np.int32]) -> None:
        """Moves counts, int32 ``[65536]``, here."""
        self.pages, self.used[0] = loops.fold_histogram(dense, self.table, self.pages, self.used[0])

    def dense(self) -> NDArray[np.int64]:
        """All counts, int64 ``[65536]``, in the bins of `FloatHistogram`: no -0, no overflow."""
        counts = np.zeros((_PAGES, _PAGE), np.int64)
        held = self.table >= 0
        counts[held] = self.pages[self.table[held]]
        flat = counts.ravel()
        for infinity in (0x7F80, 0xFF80):
            flat[infinity - 1] += flat[infinity]
            flat[infinity] = 0
        flat[0] += flat[0x8000]
        flat[0x8000] = 0
        return flat


def _joined(parts: list[DocumentMaxima]) -> DocumentMaxima:
    """All rows, one per document."""
    if not parts:
        return DocumentMaxima.empty()
    return DocumentMaxima.of(
        np.concatenate([p.document for p in parts]),
        np.concatenate([p.domain for p in parts]),
        np.concatenate([p.amax for p in parts]) + np.float32(0),
    )
