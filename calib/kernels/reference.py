# SPDX-License-Identifier: Apache-2.0
"""The torch kernel: the same update on every device, and the reference for the fused one, bit for bit.

Nothing here waits for the device: counts and sums stay where the tensor is, small results of each batch queue up there,
and all are read once, when the statistics are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from calib.kernels.plan import RowPlan
from calib.kernels.top import NOWHERE, row_places, top_values
from calib.statistics.channels import ChannelStatistics
from calib.statistics.documents import DocumentMaxima
from calib.statistics.fault import Fault
from calib.statistics.histogram import BINS, FloatHistogram
from calib.statistics.observation import GROUPS
from calib.statistics.peaks import PeakList
from calib.statistics.range import Range
from calib.statistics.site import SiteStatistics
from calib.statistics.summation import GROUP_TOKENS, UNIT_TOKENS, FixedPoint, exact_integer

__all__ = ["TorchAccumulator", "TorchKernel"]

Tensor = torch.Tensor
_LARGEST_FINITE, _SIGN = 0x7F7F, 0x8000
_MOST_COUNTED = 2**31 - 1
_MOST_QUEUED = 64


class TorchKernel:
    """Makes accumulators that work with torch operations only.

    Args:
        full: all statistics, or ranges and document maxima only.
    """

    def __init__(self, *, full: bool = True) -> None:
        self.full = full

    @property
    def name(self) -> str:
        """What files record."""
        return "torch"

    def accumulator(self, channels: int) -> TorchAccumulator:
        """A new, empty accumulator for one site."""
        return TorchAccumulator(full=self.full)

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, eq=False)
class _Queued:
    """Small results of one batch, still on the device."""

    plan: RowPlan
    nonfinite: Tensor  # int64 [segments]
    amax: Tensor  # float32 [segments]
    fault: Tensor  # int64 [segments], first non-finite (entry of the plan * channels + channel) of each, or NOWHERE
    total: Tensor | None = None  # float64 [segments]
    energy: Tensor | None = None  # float64 [segments]
    peak_value: Tensor | None = None  # float32 [k]
    peak_index: Tensor | None = None  # int64 [k], entry of the plan * channels + channel


class TorchAccumulator:
    """What one site keeps between batches, on the device of its first tensor."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._channels = 0
        self._state: dict[str, Tensor] = {}
        self._counted = 0
        self._queue: list[_Queued] = []
        self._drained = SiteStatistics(Range.empty(), DocumentMaxima.empty())
        if full:
            none = FloatHistogram.empty()
            self._drained = SiteStatistics(Range.empty(), DocumentMaxima.empty(), none, None, PeakList.empty(), none)

    def update(self, values: Tensor, plan: RowPlan) -> None:
        """Takes in one batch.

        Args:
            values: floating point ``[blocks, tokens, channels]``, any device and strides; read in float32.
            plan: the plan of this batch.
        """
        blocks, tokens, channels = values.shape
        if plan.units == 0 or channels == 0:
            return
        flat = values.detach().to(torch.float32).reshape(blocks * tokens, channels)
        if not self._state:
            self._start(channels, flat.device)
        if self._counted + flat.numel() > _MOST_COUNTED or len(self._queue) >= _MOST_QUEUED:
            self._drain()
        self._counted += flat.numel()
        index = _indices(plan, flat.device)
        finite = torch.isfinite(flat)
        self._take_extremes(flat, finite, index, plan)
        if not self._full:
            return
        clean = torch.where(finite, flat, 0.0)
        total, energy = self._take_sums(clean, index)
        self._take_counts(clean, finite, index)
        value, place = top_values(clean, index)
        last = self._queue.pop()
        self._queue.append(_Queued(plan, last.nonfinite, last.amax, last.fault, total, energy, value, place))

    def _start(self, channels: int, device: torch.device) -> None:
        self._channels = channels

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._state = {
            "minimum": full(np.inf, torch.float32, GROUPS, channels),
            "maximum": full(-np.inf, torch.float32, GROUPS, channels),
        }
        if self._full:
            self._state |= {
                "high": full(0, torch.int64, GROUPS, channels),
                "low": full(0, torch.int64, GROUPS, channels),
                "counts": full(0, torch.int32, GROUPS * BINS),
                "token_counts": full(0, torch.int32, GROUPS * BINS),
            }

    def _take_extremes(self, flat: Tensor, finite: Tensor, index: dict[str, Tensor], plan: RowPlan) -> None:
        low = _segment_extreme(torch.where(finite, flat, torch.inf), index, "amin", torch.inf)
        high = _segment_extreme(torch.where(finite, flat, -torch.inf), index, "amax", -torch.inf)
        group = index["segment_group"][:, None].expand_as(low)
        self._state["minimum"].scatter_reduce_(0, group, low, "amin")
        self._state["maximum"].scatter_reduce_(0, group, high, "amax")
        amax = torch.maximum(high.amax(1), -low.amin(1)).clamp_min(0.0)
        bad = (~finite).sum(1)[index["rows"]]
        nonfinite = torch.zeros(low.shape[0], dtype=torch.int64, device=flat.device)
        nonfinite.index_add_(0, index["row_segment"], bad)
        channel = torch.where(finite, NOWHERE, torch.arange(flat.shape[1], device=flat.device)).amin(1)[index["rows"]]
        number = torch.arange(channel.numel(), device=flat.device)
        first = torch.where(channel == NOWHERE, NOWHERE, number * flat.shape[1] + channel)
        fault = torch.full_like(nonfinite, NOWHERE).scatter_reduce_(0, index["row_segment"], first, "amin")
        self._queue.append(_Queued(plan, nonfinite, amax, fault))

    def _take_sums(self, clean: Tensor, index: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Adds up in the order of `statistics.summation`; returns float64 ``[segments]`` sums of x and of x^2."""
        padded = torch.cat([clean, clean.new_zeros(1, clean.shape[1])]).to(torch.float64)[index["unit_rows"]]
        sums = _segment_sum(padded, index)
        squares = _segment_sum(padded * padded, index)
        self._take_energy(squares, index["segment_group"])
        return _pairwise(sums.T), _pairwise(squares.T)

    def _take_energy(self, partial: Tensor, group: Tensor) -> None:
        """`FixedPoint.of` and its addition, for float64 ``[segments, channels]`` at once."""
        saturated = ~(partial < 2.0**68)
        scaled = torch.where(saturated, 0.0, partial) * 2.0**52
        upper = torch.trunc(scaled * 2.0**-60)
        low = torch.round(scaled - upper * 2.0**60).to(torch.int64)
        high = torch.where(saturated, 1 << 61, upper.to(torch.int64))
        # added in limbs of 30 bits and carried afterwards, so that no number of segments can overflow
        limb = (1 << 30) - 1
        limbs = [
            held.index_add(0, group, added)
            for number, state in ((low, self._state["low"]), (high, self._state["high"]))
            for held, added in ((state & limb, number & limb), (state >> 30, number >> 30))
        ]
        for position in range(3):
            limbs[position + 1] += limbs[position] >> 30
            limbs[position] &= limb
        full = limbs[3] >= 1 << 31
        self._state["low"] = torch.where(full, 0, (limbs[1] << 30) | limbs[0])
        self._state["high"] = torch.where(full, 1 << 61, (limbs[3] << 30) | limbs[2])

    def _take_counts(self, clean: Tensor, finite: Tensor, index: dict[str, Tensor]) -> None:
        rows, offset = index["rows"], index["row_group"] * BINS
        bins = _bins(clean[rows]) + offset[:, None]
        # what is not finite goes to the last bin of its group, a NaN pattern that no finite value has
        bins = torch.where(finite[rows], bins, offset[:, None] + BINS - 1)
        _count(self._state["counts"], bins)
        _count(self._state["token_counts"], _bins(clean[rows].abs().amax(1)) + offset)

    def _drain(self) -> None:
        """Moves what is on the device to the host."""
        state = {name: tensor.cpu().numpy() for name, tensor in self._state.items()}
        self._drained = self._drained_with(state)
        self._queue.clear()
        self._counted = 0
        for name in ("counts", "token_counts"):
            if name in self._state:
                self._state[name].zero_()

    def _drained_with(self, state: dict[str, NDArray[Any]]) -> SiteStatistics:
        """What was drained before together with counts ``state`` and the queue; extremes are the state's."""
        held = self._drained
        ranges, documents, peaks, fault = held.range, held.documents, held.peaks, held.fault
        for batch in self._queue:
            one_range, one_documents = _of_queued(batch, self._channels)
            ranges, documents = ranges.merge(one_range), documents.merge(one_documents)
            fault = fault.merge(_fault_of(batch, self._channels))
            if peaks is not None:
                peaks = peaks.merge(_peaks_of(batch, self._channels))
        histograms = [
            None if counts is None else counts.merge(_histogram(state[name]))
            for counts, name in ((held.histogram, "counts"), (held.tokens, "token_counts"))
        ]
        return SiteStatistics(ranges, documents, histograms[0], None, peaks, histograms[1], fault)

    def result(self) -> SiteStatistics:
        """The statistics of all batches so far, a copy."""
        if not self._state:
            return self._drained
        state = {name: tensor.cpu().numpy() for name, tensor in self._state.items()}
        held = self._drained_with(state)
        zero = np.float32(0)  # adding it turns -0 into +0
        low, high = state["minimum"] + zero, state["maximum"] + zero
        extremes = Range(low.min(axis=1), high.max(axis=1), *(np.zeros(GROUPS, np.int64),) * 2, (0, 0), (0, 0))
        channels = None
        if self._full:
            channels = ChannelStatistics(low, high, FixedPoint(state["high"].copy(), state["low"].copy()))
        return SiteStatistics(
            held.range.merge(extremes), held.documents, held.histogram, channels, held.peaks, held.tokens, held.fault
        )


def _indices(plan: RowPlan, device: torch.device) -> dict[str, Tensor]:
    """Index tensors of a plan on a device, made once."""
    cache = cast("dict[str, dict[str, Tensor]]", plan.__dict__.setdefault("_indices", {}))
    if str(device) not in cache:
        units_per_segment = np.diff(plan.segment_units)
        unit_rows = np.full((plan.units, UNIT_TOKENS), -1, np.int64)  # the row of zeros behind all others
        for unit, (start, stop) in enumerate(zip(plan.unit_start, plan.unit_stop, strict=True)):
            unit_rows[unit, : stop - start] = plan.rows[start:stop]
        segment_units = np.full((units_per_segment.size, int(units_per_segment.max())), plan.units, np.int64)
        for segment, first in enumerate(plan.segment_units[:-1]):
            count = units_per_segment[segment]
            segment_units[segment, :count] = np.arange(first, first + count)
        unit_segment = np.repeat(np.arange(units_per_segment.size), units_per_segment)
        row_rank, row_tie = row_places(plan)
        arrays = {
            "rows": plan.rows,
            "row_rank": row_rank,
            "row_tie": row_tie,
            "most_ties": np.empty(int(row_tie.max(initial=0)) + 1, np.uint8),  # its size is known without waiting
            "row_group": plan.row_group,
            "row_segment": np.repeat(unit_segment, plan.unit_stop - plan.unit_start),
            "unit_rows": unit_rows,
            "segment_units": segment_units,
            "segment_group": plan.segment_group,
        }
        cache[str(device)] = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return cache[str(device)]


def _segment_extreme(flat: Tensor, index: dict[str, Tensor], how: str, neutral: float) -> Tensor:
    """Extreme per segment and channel, float32 ``[segments, channels]``."""
    segments = index["segment_group"].shape[0]
    result = torch.full((segments, flat.shape[1]), neutral, dtype=torch.float32, device=flat.device)
    target = index["row_segment"][:, None].expand(-1, flat.shape[1])
    return result.scatter_reduce_(0, target, flat[index["rows"]], how)


def _pairwise(values: Tensor) -> Tensor:
    """Adds ``[n, ...]`` along its first axis by neighbours, zeros standing in for missing terms."""
    while values.shape[0] > 1:
        if values.shape[0] % 2:
            values = torch.cat([values, torch.zeros_like(values[:1])])
        values = values[0::2] + values[1::2]
    return values[0]


def _segment_sum(padded: Tensor, index: dict[str, Tensor]) -> Tensor:
    """Sum per segment and channel of ``[units, 128, channels]``, in the order of `statistics.summation`."""
    units, _, channels = padded.shape
    groups = padded.view(units, UNIT_TOKENS // GROUP_TOKENS, GROUP_TOKENS, channels)
    while groups.shape[2] > 1:
        groups = groups[:, :, 0::2] + groups[:, :, 1::2]
    total = torch.zeros(units, channels, dtype=torch.float64, device=padded.device)
    for position in range(groups.shape[1]):
        total = total + groups[:, position, 0]
    with_zero = torch.cat([total, total.new_zeros(1, channels)])
    return _pairwise(with_zero[index["segment_units"]].transpose(0, 1))


def _bins(values: Tensor) -> Tensor:
    """`statistics.histogram.bfloat16_bins` on a device, as int64."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    magnitude = (rounded & (_SIGN - 1)).clamp_max(_LARGEST_FINITE)
    return torch.where(magnitude == 0, 0, magnitude | (rounded & _SIGN))


def _count(counts: Tensor, bins: Tensor) -> None:
    """Adds one to the bin of each value."""
    flat = bins.reshape(-1)
    if flat.device.type == "cpu":
        counts += torch.bincount(flat, minlength=counts.numel()).to(torch.int32)
    else:  # bincount would wait for the device to learn the largest bin
        counts.index_add_(0, flat, torch.ones(1, dtype=torch.int32, device=flat.device).expand(flat.numel()))


def _histogram(counts: NDArray[np.int32]) -> FloatHistogram:
    dense = counts.reshape(GROUPS, BINS).copy()
    dense[:, BINS - 1] = 0  # where non-finite values were put
    return FloatHistogram.from_dense(dense)


def _of_queued(batch: _Queued, channels: int) -> tuple[Range, DocumentMaxima]:
    """Counts, sums and document maxima of one queued batch; no extremes."""
    plan = batch.plan
    starts = plan.segment_units[:-1]
    rows = np.add.reduceat(plan.unit_stop - plan.unit_start, starts)
    nonfinite = batch.nonfinite.cpu().numpy()
    counted = rows * channels - nonfinite
    count, bad = np.zeros(GROUPS, np.int64), np.zeros(GROUPS, np.int64)
    np.add.at(count, plan.segment_group, counted)
    np.add.at(bad, plan.segment_group, nonfinite)
    sums = [[0] * GROUPS, [0] * GROUPS]
    for exact, partial in zip(sums, (batch.total, batch.energy), strict=True):
        if partial is not None:
            for group, value in zip(plan.segment_group, partial.cpu().tolist(), strict=True):
                exact[group] += exact_integer(value)
    empty = Range.empty()
    total, energy = ((exact[0], exact[1]) for exact in sums)
    maxima = np.full((plan.context.document.size, GROUPS), np.nan, np.float32)
    amax = np.where(counted > 0, batch.amax.cpu().numpy() + np.float32(0), np.float32(np.nan))
    maxima[plan.segment_block, plan.segment_group] = amax
    return (
        Range(empty.minimum, empty.maximum, count, bad, total, energy),
        DocumentMaxima.of(plan.context.document, plan.context.domain, maxima),
    )


def _peaks_of(batch: _Queued, channels: int) -> PeakList:
    if batch.peak_value is None or batch.peak_index is None:
        return PeakList.empty()
    context = batch.plan.context
    entry, channel = np.divmod(batch.peak_index.cpu().numpy(), channels)
    block, position = np.divmod(batch.plan.places[entry], context.group.shape[1])
    return PeakList.of(
        batch.peak_value.cpu().numpy(),
        context.document[block],
        position.astype(np.int32),
        channel.astype(np.int32),
        context.token_id[block, position],
    )


def _fault_of(batch: _Queued, channels: int) -> Fault:
    context, fault = batch.plan.context, Fault()
    for place in batch.fault.cpu().tolist():
        if place != NOWHERE:
            entry, channel = divmod(place, channels)
            block, position = divmod(int(batch.plan.places[entry]), context.group.shape[1])
            fault = fault.merge(Fault((int(context.document[block]), position, channel)))
    return fault
