# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of the fused CPU kernel that read values: each is read from memory once.

Two passes over eight rows at a time, which stay in the first-level cache: one along rows (bins of the histogram,
largest magnitude per token), one across them (extremes and sums per channel). All loops release the interpreter lock.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from calib.kernels.prefetch import prefetch

__all__ = ["read_ranges", "read_units"]

_FASTMATH = {"nnan", "nsz"}
"""NaN is sorted out by bits before any comparison, the sign of zero is dropped at the end; sums keep their order."""
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_HIGHEST_KEY, _LOWEST_KEY = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_KEY_OF_INFINITY = np.int32(0x7F800000)
_CACHE_LINE = 16  # values


@njit(cache=True, nogil=True, fastmath=_FASTMATH)
def _read_row(bits, row, following, bins, dense):  # type: ignore[no-untyped-def]
    """Counts one row of finite values into `dense` and returns its largest magnitude as bits.

    Returns a pattern >= that of infinity, with nothing counted, if the row holds a non-finite value. The `following`
    row is fetched meanwhile.
    """
    values = bits[row]
    largest = np.uint32(0)
    for c in range(values.size):
        u = values[c]
        largest = max(largest, u & _MAGNITUDE)
        bins[c] = np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    if largest < _INFINITY:
        whole = values.size // _CACHE_LINE * _CACHE_LINE
        for start in range(0, whole, _CACHE_LINE):
            prefetch(bits, following, start)
            for c in range(_CACHE_LINE):
                dense[bins[start + c]] += 1
        for c in range(whole, values.size):
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
                following = rows[min(index + 1, rows.size - 1)]
                largest = _read_row(bits, rows[index], following, bins, counts)
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
