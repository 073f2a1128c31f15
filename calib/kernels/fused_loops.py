# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of the fused CPU kernel: each value is read from memory once.

Two passes over eight rows at a time, which stay in the first-level cache: one along rows (bins of the histogram,
largest magnitude per token), one across them (extremes and sums per channel). All loops release the interpreter lock.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["fold_histogram", "fold_peaks", "fold_units", "read_ranges", "read_units"]

_FASTMATH = {"nnan", "nsz"}
"""NaN is sorted out by bits before any comparison, the sign of zero is dropped at the end; sums keep their order."""
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_HIGHEST_KEY, _LOWEST_KEY = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_KEY_OF_INFINITY = np.int32(0x7F800000)
_PAGE_BITS = 7
_PAGE = 1 << _PAGE_BITS


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _read_row(bits, bins, dense):  # type: ignore[no-untyped-def]
    """Counts one row of finite values into `dense` and returns its largest magnitude as bits.

    Returns a pattern >= that of infinity, with nothing counted, if the row holds a non-finite value.
    """
    largest = np.uint32(0)
    for c in range(bits.size):
        u = bits[c]
        largest = max(largest, u & _MAGNITUDE)
        bins[c] = np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    if largest < _INFINITY:
        for c in range(bits.size):
            dense[bins[c]] += 1
    return largest


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _read_row_with_nonfinite(bits, dense):  # type: ignore[no-untyped-def]
    """The same for a row with NaN or infinities: counts the finite ones, returns (largest magnitude, non-finite)."""
    largest = np.uint32(0)
    nonfinite = 0
    for u in bits:
        m = u & _MAGNITUDE
        if m >= _INFINITY:
            nonfinite += 1
            continue
        largest = max(largest, m)
        dense[np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))] += 1
    return largest, nonfinite


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _read_columns(r0, r1, r2, r3, r4, r5, r6, r7, sums, squares, low, high):  # type: ignore[no-untyped-def]
    """Adds eight rows of finite values to the sums and extremes of their unit."""
    for c in range(r0.size):
        f0, f1, f2, f3, f4, f5, f6, f7 = r0[c], r1[c], r2[c], r3[c], r4[c], r5[c], r6[c], r7[c]
        low[c] = min(low[c], min(min(min(f0, f1), min(f2, f3)), min(min(f4, f5), min(f6, f7))))
        high[c] = max(high[c], max(max(max(f0, f1), max(f2, f3)), max(max(f4, f5), max(f6, f7))))
        d0, d1, d2, d3 = np.float64(f0), np.float64(f1), np.float64(f2), np.float64(f3)
        d4, d5, d6, d7 = np.float64(f4), np.float64(f5), np.float64(f6), np.float64(f7)
        sums[c] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
        squares[c] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def read_units(  # type: ignore[no-untyped-def]
    values,
    bits,
    rows,
    unit_start,
    unit_stop,
    unit_group,
    first,
    step,
    dense,
    bins,
    total,
    energy,
    minimum,
    maximum,
    nonfinite,
    row_amax,
):
    """Reads the units ``first, first + step, ...`` of a batch.

    Args:
        values, bits: float32 and uint32 views ``[rows, channels]`` of the same memory.
        rows, unit_start, unit_stop: of the `RowPlan`; `unit_group` its group per unit.
        first, step: this worker's share of the units.
        dense: int32 ``[2, 65536]``, this worker's counts, added to.
        bins: uint16 ``[channels]``, scratch.
        total, energy: float64 ``[units, channels]``; minimum, maximum: float32 ``[units, channels]``; written.
        nonfinite: int64 ``[units]``; row_amax: uint32 ``[len(rows)]``, bits of the largest magnitude; written.
    """
    channels = values.shape[1]
    for unit in range(first, unit_start.size, step):
        counts = dense[unit_group[unit]]
        sums, squares, low, high = total[unit], energy[unit], minimum[unit], maximum[unit]
        for c in range(channels):
            sums[c] = 0.0
            squares[c] = 0.0
            low[c] = np.inf
            high[c] = -np.inf
        bad_values = 0
        for start in range(unit_start[unit], unit_stop[unit], 8):
            stop = min(start + 8, unit_stop[unit])
            clean = stop - start == 8
            for index in range(start, stop):
                largest = _read_row(bits[rows[index]], bins, counts)
                if largest >= _INFINITY:
                    largest, bad = _read_row_with_nonfinite(bits[rows[index]], counts)
                    bad_values += bad
                    clean = False
                row_amax[index] = largest
            if clean:
                _read_columns(
                    values[rows[start]], values[rows[start + 1]], values[rows[start + 2]], values[rows[start + 3]],
                    values[rows[start + 4]], values[rows[start + 5]], values[rows[start + 6]], values[rows[start + 7]],
                    sums, squares, low, high,
                )  # fmt: skip
            else:
                d = np.zeros(8, np.float64)
                for c in range(channels):
                    d[:] = 0.0
                    for index in range(start, stop):
                        f = values[rows[index], c]
                        if bits[rows[index], c] & _MAGNITUDE < _INFINITY:
                            d[index - start] = f
                            low[c] = min(low[c], f)
                            high[c] = max(high[c], f)
                    sums[c] += ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7]))
                    squares[c] += ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3])) + (
                        (d[4] * d[4] + d[5] * d[5]) + (d[6] * d[6] + d[7] * d[7])
                    )
        nonfinite[unit] = bad_values


@njit(cache=True, nogil=True)
def _read_extremes(bits):  # type: ignore[no-untyped-def]
    """Smallest and largest ordered key of one row, int32 ``[channels]``: integer reductions vectorise."""
    low, high = _HIGHEST_KEY, _LOWEST_KEY
    for c in range(bits.size):
        key = bits[c] ^ ((bits[c] >> np.int32(31)) & _HIGHEST_KEY)
        low = min(low, key)
        high = max(high, key)
    return low, high


@njit(cache=True, nogil=True)
def read_ranges(bits, rows, unit_start, unit_stop, first, step, low, high, nonfinite):  # type: ignore[no-untyped-def]
    """Extremes only, as ordered keys: integers that compare like the floats they stand for.

    Args:
        bits: int32 view ``[rows, channels]`` of float32 values.
        rows, unit_start, unit_stop: of the `RowPlan`.
        first, step: this worker's share of the units.
        low, high: int32 ``[units]``, keys of the extremes; nonfinite: int64 ``[units]``; written.
    """
    for unit in range(first, unit_start.size, step):
        unit_low, unit_high, bad = _KEY_OF_INFINITY, ~_KEY_OF_INFINITY, 0
        for index in range(unit_start[unit], unit_stop[unit]):
            row = bits[rows[index]]
            row_low, row_high = _read_extremes(row)
            if row_high >= _KEY_OF_INFINITY or row_low <= ~_KEY_OF_INFINITY:
                row_low, row_high = _KEY_OF_INFINITY, ~_KEY_OF_INFINITY
                for s in row:
                    key = s ^ ((s >> np.int32(31)) & _HIGHEST_KEY)
                    if ~_KEY_OF_INFINITY < key < _KEY_OF_INFINITY:
                        row_low = min(row_low, key)
                        row_high = max(row_high, key)
                    else:
                        bad += 1
            unit_low = min(unit_low, row_low)
            unit_high = max(unit_high, row_high)
        low[unit], high[unit], nonfinite[unit] = unit_low, unit_high, bad


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _pairwise(values, first, count):  # type: ignore[no-untyped-def]
    """Adds rows ``first .. first + count`` by neighbours, in place; the sum is left in row `first`."""
    channels = values.shape[1]
    while count > 1:
        half = count // 2
        for i in range(half):
            for c in range(channels):
                values[first + i, c] = values[first + 2 * i, c] + values[first + 2 * i + 1, c]
        if count % 2:
            for c in range(channels):
                values[first + half, c] = values[first + count - 1, c] + 0.0
        count = half + count % 2


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _pairwise_channels(values):  # type: ignore[no-untyped-def]
    """Adds ``[channels]`` by neighbours, destroying it."""
    count = values.size
    while count > 1:
        half = count // 2
        for i in range(half):
            values[i] = values[2 * i] + values[2 * i + 1]
        if count % 2:
            values[half] = values[count - 1] + 0.0
        count = half + count % 2
    return values[0]


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def fold_units(  # type: ignore[no-untyped-def]
    segment_group,
    segment_units,
    total,
    energy,
    minimum,
    maximum,
    state_minimum,
    state_maximum,
    state_high,
    state_low,
    segment_total,
    segment_energy,
    segment_amax,
):
    """Adds the units of each segment pairwise and folds them in the channel statistics.

    Args:
        segment_group, segment_units: of the `RowPlan`.
        total, energy, minimum, maximum: of `read_units`; destroyed.
        state_minimum, state_maximum: float32 ``[2, channels]``; state_high, state_low: int64 ``[2, channels]``.
        segment_total, segment_energy: float64 ``[segments]``; segment_amax: float32 ``[segments]``; written.
    """
    channels = total.shape[1]
    for segment in range(segment_group.size):
        group = segment_group[segment]
        first, count = segment_units[segment], segment_units[segment + 1] - segment_units[segment]
        _pairwise(total, first, count)
        _pairwise(energy, first, count)
        amax = np.float32(0)
        for c in range(channels):
            low, high = minimum[first, c], maximum[first, c]
            for unit in range(first + 1, first + count):
                low = min(low, minimum[unit, c])
                high = max(high, maximum[unit, c])
            amax = max(amax, max(high, -low))
            state_minimum[group, c] = min(state_minimum[group, c], low)
            state_maximum[group, c] = max(state_maximum[group, c], high)
            # statistics.summation.FixedPoint, one addition
            partial = energy[first, c]
            if partial < 2.0**68:
                scaled = partial * 2.0**52
                upper = np.trunc(scaled * 2.0**-60)
                lower = state_low[group, c] + np.int64(np.rint(scaled - upper * 2.0**60))
                total_high = state_high[group, c] + np.int64(upper) + (lower >> 60)
                if total_high >= 1 << 61:
                    state_high[group, c], state_low[group, c] = 1 << 61, 0
                else:
                    state_high[group, c], state_low[group, c] = total_high, lower & ((1 << 60) - 1)
            else:
                state_high[group, c], state_low[group, c] = 1 << 61, 0
        segment_total[segment] = _pairwise_channels(total[first])
        segment_energy[segment] = _pairwise_channels(energy[first])
        segment_amax[segment] = amax


@njit(cache=True, nogil=True, inline="always")
def _page_of(table, used, key):  # type: ignore[no-untyped-def]
    """Where the page of bins ``key * 128 ..`` of a histogram is in the pool; takes the next one if it has none yet."""
    if table[key] < 0:
        table[key] = used[0]
        used[0] += 1
    return table[key]


@njit(cache=True, nogil=True)
def fold_histogram(dense, table, pages, used):  # type: ignore[no-untyped-def]
    """Moves the counts of one group, int32 ``[65536]``, to its pages in the pool and clears them."""
    for key in range(table.size):
        counts = dense[key << _PAGE_BITS : (key + 1) << _PAGE_BITS]
        any_count = np.int32(0)
        for i in range(_PAGE):
            any_count |= counts[i]
        if any_count:
            page = pages[_page_of(table, used, key)]
            for i in range(_PAGE):
                page[i] += counts[i]
                counts[i] = 0


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def fold_peaks(  # type: ignore[no-untyped-def]
    values,
    bits,
    rows,
    places,
    row_group,
    row_amax,
    tokens,
    document,
    token_id,
    token_tables,
    pages,
    used,
    peak_bits,
    peak_place,
    peak_used,
):
    """Counts the token maxima and takes new peaks in.

    Args:
        values, bits: float32 and uint32 ``[blocks * tokens, channels]``.
        rows, places, row_group: of the `RowPlan`; row_amax: of `read_units`.
        tokens: tokens per block.
        document: int64 ``[blocks]``; token_id: int64 ``[blocks, tokens]``.
        token_tables: int32 ``[2, 512]``; pages, used: the pool, with room for 512 more pages.
        peak_bits: uint32 ``[k]``, bits of the value; peak_place: int64 ``[k, 4]``, document, position, channel, token.
        peak_used: entries in use, sorted, best first.

    Returns:
        How many entries are in use now.
    """
    limit = peak_bits.size
    channels = values.shape[1]
    for index in range(rows.size):
        amax = row_amax[index]
        bin_ = (amax + np.uint32(0x7FFF) + ((amax >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        bin_ = min(bin_, np.uint32(0x7F7F))
        key = np.int64(bin_ >> _PAGE_BITS)
        page = pages[_page_of(token_tables[row_group[index]], used, key)]
        page[bin_ & np.uint32(_PAGE - 1)] += 1
        full = peak_used == limit
        if amax == 0 or (full and amax < peak_bits[limit - 1] & _MAGNITUDE):
            continue
        row = rows[index]
        block, position = places[index] // tokens, places[index] % tokens
        for c in range(channels):
            magnitude = bits[row, c] & _MAGNITUDE
            if magnitude == 0 or magnitude >= _INFINITY:
                continue
            if peak_used == limit and magnitude < peak_bits[limit - 1] & _MAGNITUDE:
                continue
            place = (document[block], position, c, token_id[block, position])
            at = peak_used
            while at > 0:
                other = peak_bits[at - 1] & _MAGNITUDE
                if other > magnitude:
                    break
                if other == magnitude:
                    entry = peak_place[at - 1]
                    if (entry[0], entry[1], entry[2], entry[3]) <= place:
                        break
                at -= 1
            if at == limit:
                continue
            last = min(peak_used, limit - 1)
            for i in range(last, at, -1):
                peak_bits[i] = peak_bits[i - 1]
                peak_place[i] = peak_place[i - 1]
            peak_bits[at] = bits[row, c]
            peak_place[at, 0], peak_place[at, 1], peak_place[at, 2], peak_place[at, 3] = place
            peak_used = min(peak_used + 1, limit)
    return peak_used
