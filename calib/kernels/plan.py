# SPDX-License-Identifier: Apache-2.0
"""`RowPlan`: which rows of a batch are read together, worked out once per batch and shared by all of its sites."""

from __future__ import annotations

from dataclasses import dataclass
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
        segment_block, segment_group: int64 ``[segments]``.
        unit_start, unit_stop: int64 ``[units]``, slices of `rows`.
        segment_units: int64 ``[segments + 1]``, slices of the units.
    """

    context: Observation
    rows: NDArray[np.int64]
    segment_block: NDArray[np.int64]
    segment_group: NDArray[np.int64]
    unit_start: NDArray[np.int64]
    unit_stop: NDArray[np.int64]
    segment_units: NDArray[np.int64]

    @classmethod
    def of(cls, context: Observation) -> RowPlan:
        """The plan of one batch."""
        blocks, tokens = context.group.shape
        rows, segments, starts, stops, slices = [], [], [], [], [0]
        position = 0
        for block in range(blocks):
            for group in range(GROUPS):
                members = np.flatnonzero(context.group[block] == group)
                if not members.size:
                    continue
                rows.append(members + block * tokens)
                segments.append((block, group))
                for start in range(0, members.size, UNIT_TOKENS):
                    starts.append(position + start)
                    stops.append(position + min(start + UNIT_TOKENS, members.size))
                position += members.size
                slices.append(len(starts))
        pairs = np.array(segments, np.int64).reshape(-1, 2)
        return cls(
            context,
            np.concatenate(rows) if rows else np.zeros(0, np.int64),
            pairs[:, 0].copy(),
            pairs[:, 1].copy(),
            np.array(starts, np.int64),
            np.array(stops, np.int64),
            np.array(slices, np.int64),
        )

    @cached_property
    def row_group(self) -> NDArray[np.int64]:
        """Group of each entry of `rows`."""
        return self.context.group.ravel()[self.rows].astype(np.int64)

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.unit_start.size)
