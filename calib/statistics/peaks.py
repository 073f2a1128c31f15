# SPDX-License-Identifier: Apache-2.0
"""`PeakList`: the largest values of a site, and where each of them was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import EXCLUDED, Observation

__all__ = ["PEAKS", "PeakList"]

PEAKS = 100
"""Length of the list: the top 100 of arXiv 2605.15572."""


@dataclass(frozen=True, eq=False)
class PeakList:
    """The top values by magnitude, largest first.

    Law: the first `limit` of both lists under one total order (magnitude descending, then document, position, channel,
    token, sign ascending), which is commutative and associative. Zeros are no peaks, and token texts are never kept.

    Attributes:
        value: float32 ``[k]``, signed.
        document: int64 ``[k]``; -1 if unknown.
        position: int32 ``[k]``, token position in its block.
        channel: int32 ``[k]``.
        token_id: int64 ``[k]``; -1 if there is no token.
        limit: most entries kept.
    """

    value: NDArray[np.float32]
    document: NDArray[np.int64]
    position: NDArray[np.int32]
    channel: NDArray[np.int32]
    token_id: NDArray[np.int64]
    limit: int = PEAKS

    @classmethod
    def empty(cls, limit: int = PEAKS) -> PeakList:
        """The neutral element."""
        return cls(
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            limit,
        )

    @classmethod
    def of(
        cls,
        value: NDArray[np.float32],
        document: NDArray[np.int64],
        position: NDArray[np.int32],
        channel: NDArray[np.int32],
        token_id: NDArray[np.int64],
        limit: int = PEAKS,
    ) -> PeakList:
        """The peaks among any number of candidates, in any order."""
        order = np.lexsort((value, token_id, channel, position, document, -np.abs(value)))
        order = order[value[order] != 0][:limit]
        return cls(
            value[order].astype(np.float32),
            document[order].astype(np.int64),
            position[order].astype(np.int32),
            channel[order].astype(np.int32),
            token_id[order].astype(np.int64),
            limit,
        )

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation, limit: int = PEAKS) -> PeakList:
        """The peaks of one batch ``[blocks, tokens, channels]``: the definition that kernels are tested against."""
        valid = np.isfinite(values) & (context.group != EXCLUDED)[..., None]
        block, position, channel = np.nonzero(valid)
        return cls.of(
            values[valid],
            context.document[block],
            position.astype(np.int32),
            channel.astype(np.int32),
            context.token_id[block, position],
            limit,
        )

    def merge(self, other: PeakList) -> PeakList:
        """The peaks of both sets of values."""
        return PeakList.of(
            np.concatenate([self.value, other.value]),
            np.concatenate([self.document, other.document]),
            np.concatenate([self.position, other.position]),
            np.concatenate([self.channel, other.channel]),
            np.concatenate([self.token_id, other.token_id]),
            min(self.limit, other.limit),
        )

    def __len__(self) -> int:
        return int(self.value.size)

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file, each ``[k]``."""
        return {
            "value": self.value,
            "document": self.document,
            "position": self.position,
            "channel": self.channel,
            "token_id": self.token_id,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]], limit: int = PEAKS) -> PeakList:
        """The inverse of `to_tensors`."""
        return cls(
            tensors["value"].astype(np.float32),
            tensors["document"].astype(np.int64),
            tensors["position"].astype(np.int32),
            tensors["channel"].astype(np.int32),
            tensors["token_id"].astype(np.int64),
            limit,
        )
