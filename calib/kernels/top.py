# SPDX-License-Identifier: Apache-2.0
"""Finds the largest values of a batch on its device, in the order of `PeakList`, without waiting for the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calib.kernels.plan import RowPlan
from calib.statistics.peaks import PEAKS

__all__ = ["NOWHERE", "row_places", "top_values"]

Tensor = torch.Tensor
_MAGNITUDE = 0x7FFFFFFF
NOWHERE = 2**62
"""A place behind all others."""


def top_values(clean: Tensor, index: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The top values in the order of `PeakList`: values and ``entry of the plan * channels + channel``.

    A row is placed by its rank of (document, position) and, where blocks share both, by its tie. The top k values lie
    in the top k rows by largest magnitude, k times the most ties, so only those are searched.
    """
    channels, ties = clean.shape[1], int(index["most_ties"].numel())
    rows, rank, tie = index["rows"], index["row_rank"], index["row_tie"]
    magnitude = clean.view(torch.int32) & _MAGNITUDE
    best = _first(magnitude[rows].amax(1), rank * ties + tie, PEAKS * ties)
    best_rows, rank, tie = rows[best], rank[best][:, None], tie[best][:, None]
    element = (rank * channels + torch.arange(channels, device=clean.device)) * ties + tie
    number = _first(magnitude[best_rows].flatten(), element.flatten(), PEAKS)
    entry, channel = best[number // channels], number % channels
    return clean[rows[entry], channel], entry * channels + channel


def _first(magnitude: Tensor, place: Tensor, count: int) -> Tensor:
    """Indices of the first `count` in the order (magnitude descending, place ascending), in any order.

    The device may break ties of its own sort as it likes, so those at the last magnitude are chosen by their place.

    Args:
        magnitude: int32 ``[n]``.
        place: int64 ``[n]``, all different.
        count: how many.
    """
    count = min(count, magnitude.numel())
    top = magnitude.topk(count)
    least = top.values[-1]
    larger = (top.values > least).sum()
    tied = torch.where(magnitude == least, place, NOWHERE).topk(count, largest=False).indices
    number = torch.arange(count, device=place.device)
    return torch.where(number < larger, top.indices, tied[(number - larger).clamp_min(0)])


def row_places(plan: RowPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of each entry of `plan.rows` in the order (document, position), and its tie: number among equals by token.

    Returns:
        int64 ``[rows]`` each.
    """
    block, position = np.divmod(plan.places, plan.context.group.shape[1])
    document, token = plan.context.document[block], plan.context.token_id[block, position]
    order = np.lexsort((token, position, document))
    new = np.ones(order.size, np.bool_)
    new[1:] = (np.diff(document[order]) != 0) | (np.diff(position[order]) != 0)
    rank, tie = np.empty(order.size, np.int64), np.empty(order.size, np.int64)
    rank[order] = np.cumsum(new) - 1
    tie[order] = np.arange(order.size) - np.flatnonzero(new)[rank[order]]
    return rank, tie
