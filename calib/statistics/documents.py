# SPDX-License-Identifier: Apache-2.0
"""`DocumentMaxima`: the largest magnitude in each document, the raw material of convergence and exceedance bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import GROUPS, Observation

__all__ = ["DocumentMaxima"]


@dataclass(frozen=True, eq=False)
class DocumentMaxima:
    """One row per document, ascending.

    Law: rows of the same document merge by maximum; exact, commutative, associative. Grows with documents.

    Attributes:
        document: int64 ``[n]``, ascending, unique. -1 gathers what has no document.
        domain: int16 ``[n]``, index into the corpus' domains.
        amax: float32 ``[n, 2]`` per position group; NaN where a document had no finite value in that group.
    """

    document: NDArray[np.int64]
    domain: NDArray[np.int16]
    amax: NDArray[np.float32]

    @classmethod
    def empty(cls) -> DocumentMaxima:
        """The neutral element."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int16), np.zeros((0, GROUPS), np.float32))

    @classmethod
    def of(cls, document: NDArray[np.int64], domain: NDArray[np.int16], amax: NDArray[np.float32]) -> DocumentMaxima:
        """From any number of rows ``[n]``, ``[n]``, ``[n, 2]``, documents repeated or not."""
        unique, inverse = np.unique(document, return_inverse=True)
        merged = np.full((unique.size, GROUPS), np.nan, np.float32)
        np.fmax.at(merged, inverse, amax)
        # one domain per document; for the nameless document -1 the smallest, so that order cannot matter
        domains = np.full(unique.size, np.iinfo(np.int16).max, np.int16)
        np.minimum.at(domains, inverse, domain)
        return cls(unique.astype(np.int64), domains, merged)

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> DocumentMaxima:
        """Of one batch ``[blocks, tokens, channels]``: the definition that kernels are tested against."""
        amax = np.full((values.shape[0], GROUPS), np.nan, np.float32)
        for index, (block, groups) in enumerate(zip(values, context.group, strict=True)):
            for group in range(GROUPS):
                rows = block[groups == group]
                finite = rows[np.isfinite(rows)]
                if finite.size:
                    amax[index, group] = np.abs(finite).max()
        return cls.of(context.document, context.domain, amax)

    def of_group(self, group: int) -> DocumentMaxima:
        """The same documents with the other group emptied."""
        amax = np.where(np.arange(GROUPS) == group, self.amax, np.float32(np.nan))
        return DocumentMaxima(self.document, self.domain, amax)

    def merge(self, other: DocumentMaxima) -> DocumentMaxima:
        """Of both sets of values."""
        return DocumentMaxima.of(
            np.concatenate([self.document, other.document]),
            np.concatenate([self.domain, other.domain]),
            np.concatenate([self.amax, other.amax]),
        )

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file."""
        return {"document": self.document, "domain": self.domain, "amax": self.amax}

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> DocumentMaxima:
        """The inverse of `to_tensors`; a flat `amax` is accepted."""
        return cls(
            tensors["document"].astype(np.int64),
            tensors["domain"].astype(np.int16),
            tensors["amax"].astype(np.float32).reshape(-1, GROUPS),
        )
