# SPDX-License-Identifier: Apache-2.0
"""`RowPlan`: which rows of a batch are read together, worked out once per batch and shared by all of its sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import GROUPS, Observation
from calib.statistics.summation import UNIT_TOKENS

__all__ = ["RowPlan"]


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Rows of a batch ``[blocks * tokens, channels]`` ordered by (block, group), in units of at most 128 tokens.

    A *segment* is the tokens of one group in one block, a *unit* a slice of a segment (see `statistics.summation`).

    Attributes:
        context: the batch that this plan is for.
        rows: int64 ``[n]``, row numbers; excluded tokens are left out.
        places: int64 ``[n]``, which token of the context each of them is, as ``block * tokens + position``. The same
            as `rows`, unless the values are some rows only, in another order: the tokens routed to one expert.
        segment_block, segment_group: int64 ``[segments]``.
        unit_start, unit_stop: int64 ``[units]``, slices of `rows`.
        segment_units: int64 ``[segments + 1]``, slices of the units.
        parts: the same values by modality, a plan for the tokens of each; empty unless a model has several.
    """

    context: Observation
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    segment_block: NDArray[np.int64]
    segment_group: NDArray[np.int64]
    unit_start: NDArray[np.int64]
    unit_stop: NDArray[np.int64]
    segment_units: NDArray[np.int64]
    parts: dict[str, RowPlan] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Observation) -> RowPlan:
        """The plan of values ``[blocks, tokens, channels]``, all tokens of the batch."""
        places = np.arange(context.group.size, dtype=np.int64)
        return cls.routed(context, places)

    @classmethod
    def routed(cls, context: Observation, place: NDArray[np.int64]) -> RowPlan:
        """The plan of values ``[1, n, channels]`` whose rows are some tokens of the batch, in any order.

        Args:
            context: the whole batch.
            place: int64 ``[n]``, ``block * tokens + position`` of each row.
        """
        tokens = context.group.shape[1]
        group = context.group.ravel()[place].astype(np.int64)
        order = np.lexsort((place, group, place // tokens))
        order = order[group[order] < GROUPS]
        segment = (place[order] // tokens) * GROUPS + group[order]
        first = np.flatnonzero(np.diff(segment, prepend=-1))
        sizes = np.diff(first, append=order.size)
        units = -(-sizes // UNIT_TOKENS)
        slices = np.concatenate([np.zeros(1, np.int64), np.cumsum(units)])
        within = np.arange(slices[-1]) - np.repeat(slices[:-1], units)
        starts = np.repeat(first, units) + within * UNIT_TOKENS
        stops = np.minimum(starts + UNIT_TOKENS, np.repeat(first + sizes, units))
        return cls(
            context,
            order,
            place[order],
            segment[first] // GROUPS,
            segment[first] % GROUPS,
            starts,
            stops,
            slices,
        )

    @cached_property
    def row_group(self) -> NDArray[np.int64]:
        """Group of each entry of `rows`."""
        return self.context.group.ravel()[self.places].astype(np.int64)

    @cached_property
    def unit_group(self) -> NDArray[np.int64]:
        """Group of each unit."""
        return np.repeat(self.segment_group, np.diff(self.segment_units))

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.unit_start.size)
