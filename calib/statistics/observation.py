# SPDX-License-Identifier: Apache-2.0
"""What a statistic is told about the values that it sees.

Every site is brought to one layout, ``[blocks, tokens, channels]``, before a statistic meets it. An `Observation`
says, for each token of each block, which *group* it belongs to. Groups keep apart what would otherwise blur:
the first few tokens of a block are attention sinks with values hundreds of times larger than all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXCLUDED", "GROUPS", "REST", "SINK", "Observation"]

REST, SINK = 0, 1
"""Groups of token positions: the body of a block, and its first tokens."""
GROUPS = 2
EXCLUDED = 255
"""Marks a token that never counts, such as padding."""


@dataclass(frozen=True, eq=False)
class Observation:
    """Context of one batch.

    Attributes:
        group: uint8 ``[blocks, tokens]``, each `REST`, `SINK` or `EXCLUDED`.
        document: int64 ``[blocks]``, the document a block was cut from; -1 if unknown.
        domain: int16 ``[blocks]``, index into the corpus' domains.
        token_id: int64 ``[blocks, tokens]``; -1 where there is no token (images, pooled vectors).
    """

    group: NDArray[np.uint8]
    document: NDArray[np.int64]
    domain: NDArray[np.int16]
    token_id: NDArray[np.int64]

    @classmethod
    def of_shape(cls, blocks: int, tokens: int) -> Observation:
        """Context of values about whose tokens nothing is known: one group, no documents."""
        return cls(
            group=np.full((blocks, tokens), REST, np.uint8),
            document=np.full(blocks, -1, np.int64),
            domain=np.zeros(blocks, np.int16),
            token_id=np.full((blocks, tokens), -1, np.int64),
        )

    @classmethod
    def of_tokens(
        cls,
        token_id: NDArray[np.int64],
        *,
        document: NDArray[np.int64] | None = None,
        domain: NDArray[np.int16] | None = None,
        valid: NDArray[np.bool_] | None = None,
        sink_positions: int = 4,
    ) -> Observation:
        """Context of a batch of token blocks.

        Args:
            token_id: int64 ``[blocks, tokens]``.
            document: int64 ``[blocks]``; unknown if absent.
            domain: int16 ``[blocks]``; domain 0 if absent.
            valid: bool ``[blocks, tokens]``, False on padding. Sink positions are counted from the first valid token.
            sink_positions: how many first tokens of a block form the group `SINK`.
        """
        blocks, tokens = token_id.shape
        mask = np.ones((blocks, tokens), np.bool_) if valid is None else valid
        rank = np.cumsum(mask, axis=1)
        group = np.where(rank <= sink_positions, SINK, REST).astype(np.uint8)
        group[~mask] = EXCLUDED
        return cls(
            group=group,
            document=np.full(blocks, -1, np.int64) if document is None else document,
            domain=np.zeros(blocks, np.int16) if domain is None else domain,
            token_id=token_id,
        )
