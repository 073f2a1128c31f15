# SPDX-License-Identifier: Apache-2.0
"""`WeightStatistics`: extremes per output row and input column and the distribution of a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.statistics.histogram import FloatHistogram
from calib.statistics.range import Range

__all__ = ["WeightStatistics"]


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """A weight seen as ``[rows, columns]``: rows are outputs, columns are inputs (of a convolution: input x kernel).

    A weight is measured whole, once; there is nothing to merge.

    Attributes:
        row_min: float32 ``[rows]``.
        row_max: float32 ``[rows]``.
        column_amax: float32 ``[columns]``.
        range: over all elements (group 0).
        histogram: over all elements (group 0).
        shape: of the parameter as stored.
    """

    row_min: NDArray[np.float32]
    row_max: NDArray[np.float32]
    column_amax: NDArray[np.float32]
    range: Range
    histogram: FloatHistogram
    shape: tuple[int, ...]

    def to_tensors(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a file."""
        return {
            "rows.minimum": self.row_min,
            "rows.maximum": self.row_max,
            "columns.amax": self.column_amax,
            "shape.sizes": np.array(self.shape, np.int64),
            **{f"range.{k}": v for k, v in self.range.to_tensors().items()},
            **{f"histogram.{k}": v for k, v in self.histogram.to_tensors().items()},
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.generic]]) -> WeightStatistics:
        """The inverse of `to_tensors`."""

        def part(prefix: str) -> dict[str, NDArray[np.generic]]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        return cls(
            tensors["rows.minimum"].astype(np.float32),
            tensors["rows.maximum"].astype(np.float32),
            tensors["columns.amax"].astype(np.float32),
            Range.from_tensors(part("range.")),
            FloatHistogram.from_tensors(part("histogram.")),
            tuple(int(n) for n in tensors["shape.sizes"]),
        )
