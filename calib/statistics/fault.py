# SPDX-License-Identifier: Apache-2.0
"""`Fault`: where the first non-finite value of a site was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.observation import EXCLUDED, Observation

__all__ = ["Fault"]


@dataclass(frozen=True, eq=False)
class Fault:
    """The first NaN or infinity in the order (document, position, channel).

    Law: the smaller of two places; commutative, associative.

    Attributes:
        place: (document, position, channel), or None while all values were finite.
    """

    place: tuple[int, int, int] | None = None

    @classmethod
    def observe(cls, values: NDArray[np.float32], context: Observation) -> Fault:
        """Of one batch ``[blocks, tokens, channels]``."""
        bad = ~np.isfinite(values) & (context.group != EXCLUDED)[..., None]
        if not bad.any():
            return cls()
        block, position, channel = np.nonzero(bad)
        document = context.document[block]
        first = np.lexsort((channel, position, document))[0]
        return cls((int(document[first]), int(position[first]), int(channel[first])))

    def merge(self, other: Fault) -> Fault:
        """Of both sets of values."""
        places = [f.place for f in (self, other) if f.place is not None]
        return Fault(min(places, default=None))

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file: int64 ``[3]``, or ``[0]`` if there was no fault."""
        return {"place": np.array(self.place or (), np.int64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> Fault:
        """The inverse of `to_tensors`."""
        place = [int(n) for n in tensors["place"]]
        return cls((place[0], place[1], place[2]) if place else None)
