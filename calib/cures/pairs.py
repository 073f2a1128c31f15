# SPDX-License-Identifier: Apache-2.0
"""`Pairs`: which weights can take over the scale of which tensors, found from the model itself.

A *producer* (a norm, or rows of a linear layer) feeds *consumers* (linear layers) and nothing else. Dividing its
channels by s and multiplying the consumers' columns by s changes the tensor between them and no result
(SmoothQuant, Xiao et al. 2023, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.cures.rules import Rule

__all__ = ["Consumer", "Pair", "Pairs"]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer that reads a producer.

    Attributes:
        module: fully qualified name.
        channels: int64 ``[inputs]``; for each input the place in `Pair.rows` that it is proportional to, -1 if none.
    """

    module: str
    channels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pair:
    """One producer and all that read it.

    Attributes:
        producer: fully qualified name.
        rows: int64 ``[channels]``, its output channels that take part.
        whole: whether these are all of its output channels.
        consumers: at least one, in order of execution.
        rule: how the producer's parameters change.
    """

    producer: str
    rows: NDArray[np.int64]
    whole: bool
    consumers: tuple[Consumer, ...]
    rule: Rule

    @property
    def name(self) -> str:
        """The producer's name; with first and last row (exclusive), and their number if they are not all between."""
        if self.whole:
            return self.producer
        first, stop = int(self.rows[0]), int(self.rows[-1]) + 1
        number = "" if stop - first == self.rows.size else f", {self.rows.size} rows"
        return f"{self.producer}[{first}:{stop}{number}]"

    @property
    def channels(self) -> int:
        """Number of scales of this pair."""
        return int(self.rows.size)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What was found in one model.

    Attributes:
        pairs: in order of execution; no input channel of any consumer is in two of them.
        skipped: layers with weights whose input no pair covers -> the reason.
    """

    pairs: tuple[Pair, ...]
    skipped: dict[str, str]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, name: str) -> Pair:
        found = next((pair for pair in self.pairs if name in (pair.name, pair.producer)), None)
        if found is None:
            raise KeyError(name)
        return found
