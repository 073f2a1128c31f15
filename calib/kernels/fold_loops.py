# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of the fused CPU kernel that fold what `read_loops` found into the state of a site."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["fold_counts", "fold_histogram", "fold_keys", "fold_peaks", "fold_units"]

_FASTMATH = {"nnan", "nsz"}
"""Nothing that is folded is NaN, and the sign of zero is dropped at the end; sums keep their order."""
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_HIGHEST_KEY = np.int32(0x7FFFFFFF)
_PAGE_BITS = 7
_PAGE = 1 << _PAGE_BITS


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


@njit(cache=True, nogil=True)
def fold_counts(  # type: ignore[no-untyped-def]
    segment_block,
    segment_group,
    segment_units,
    unit_start,
    unit_stop,
    unit_nonfinite,
    channels,
    segment_amax,
    state_count,
    state_nonfinite,
    document_amax,
):
    """Counts the values of each segment, and writes its largest magnitude down.

    Args:
        segment_block, segment_group, segment_units, unit_start, unit_stop: of the `RowPlan`.
        unit_nonfinite: int64 ``[units]``; segment_amax: float32 ``[segments]``, of finite values.
        state_count, state_nonfinite: int64 ``[2]``, added to.
        document_amax: float32 ``[blocks, 2]``; NaN is left where a block has no finite value of a group.

    Returns:
        Whether any value was NaN or infinite.
    """
    any_bad = False
    for segment in range(segment_group.size):
        rows, bad = 0, 0
        for unit in range(segment_units[segment], segment_units[segment + 1]):
            rows += unit_stop[unit] - unit_start[unit]
            bad += unit_nonfinite[unit]
        group = segment_group[segment]
        finite = rows * channels - bad
        state_count[group] += finite
        state_nonfinite[group] += bad
        any_bad |= bad > 0
        if finite > 0:
            document_amax[segment_block[segment], group] = segment_amax[segment]
    return any_bad


@njit(cache=True, nogil=True)
def _float_of_key(key):  # type: ignore[no-untyped-def]
    """The float32 that an ordered key stands for."""
    return np.int32(key ^ ((key >> np.int32(31)) & _HIGHEST_KEY)).view(np.float32)


@njit(cache=True, nogil=True)
def fold_keys(segment_group, segment_units, low, high, state_low, state_high, segment_amax):  # type: ignore[no-untyped-def]
    """Folds the extremes of each segment in the range.

    Args:
        segment_group, segment_units: of the `RowPlan`.
        low, high: of `read_ranges`.
        state_low, state_high: float32 ``[2]``; segment_amax: float32 ``[segments]``, written.
    """
    for segment in range(segment_group.size):
        group, first, stop = segment_group[segment], segment_units[segment], segment_units[segment + 1]
        smallest = _float_of_key(low[first:stop].min())
        largest = _float_of_key(high[first:stop].max())
        state_low[group] = min(state_low[group], smallest)
        state_high[group] = max(state_high[group], largest)
        segment_amax[segment] = max(np.float32(0), max(largest, -smallest))


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
