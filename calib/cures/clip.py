# SPDX-License-Identifier: Apache-2.0
"""`Clip`: grids that reach as far as the text of the search did, and not as far as all the text.

The more text, the rarer the events in it: a channel that fires once in a hundred blocks has next to no range in the
first eight, so smoothing makes it loud, and its one peak then takes the levels away from all others. Whether it is
better to clip such a peak or to represent it is not to be seen in the tensor: the loss says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.corpus import TokenBlocks
from calib.measurement import Measurement, Site
from calib.schema.scales import CureRecord
from calib.statistics import REST
from calib.statistics.range import Range

__all__ = ["Clip"]

_GROWTH = 1.01
"""Of a range, from less text to more, below which there is nothing to gain; the rounding of a folded model is 1e-5."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Tensors whose grid does not reach up to the largest value that was seen.

    Attributes:
        limits: canonical site name -> lowest and highest value that is represented.
        growth: site name -> largest magnitude in all the text over that within the limits, above 1.
        blocks: how much text the limits come from.
        all_blocks: how much there is.
    """

    limits: Mapping[str, tuple[float, float]]
    growth: Mapping[str, float]
    blocks: int
    all_blocks: int

    @classmethod
    def to(cls, searched: Measurement, measured: Measurement, *, include_sink: bool) -> Clip | None:
        """To the ranges of linear inputs in a part of the text; None where all the text has hardly larger ones.

        A tensor of which that part says nothing, as nothing but zeros reached it, is not clipped.

        Args:
            searched: of the part.
            measured: of the same model, on all the text.
            include_sink: whether the first positions of a block count.
        """
        limits, growth = {}, {}
        for name, site in measured.sites.items():
            known = searched.sites.get(name)
            if known is None or "linear_input" not in site.kinds:
                continue
            part, whole = (_counted(one, include_sink=include_sink) for one in (known, site))
            if 0 < part.amax * _GROWTH < whole.amax:
                limits[name] = (float(part.min), float(part.max))
                growth[name] = whole.amax / part.amax
        if not limits:
            return None
        return cls(limits, growth, searched.corpus.blocks, measured.corpus.blocks)

    def most_affected(self, measured: Measurement, blocks: TokenBlocks, skip: int, most: int) -> NDArray[np.int64]:
        """Rows of the text that lose most, by the peaks of the tensors that are clipped most.

        Args:
            measured: of all the text, with peaks.
            blocks: the text, without a prefix.
            skip: tokens of the prefix that was in front of it.
            most: how many rows at the most.

        Returns:
            Row numbers, int64 ``[n]``.
        """
        rows: dict[int, None] = {}
        for name in sorted(self.limits, key=lambda one: -self.growth[one]):
            row = self._row_beyond(measured.sites[name], blocks, skip)
            if row is not None:
                rows[row] = None
            if len(rows) == most:
                break
        return np.array(list(rows), np.int64)

    def _row_beyond(self, site: Site, blocks: TokenBlocks, skip: int) -> int | None:
        """Where a site has the largest of its values beyond the limits."""
        peaks = site.statistics.peaks
        if peaks is None:
            return None
        low, high = self.limits[site.name]
        positions = peaks.position - skip
        beyond = ((peaks.value < low) | (peaks.value > high)) & (positions >= 0)
        for document, position, token in zip(
            peaks.document[beyond], positions[beyond], peaks.token_id[beyond], strict=True
        ):
            found = (blocks.document == document) & (blocks.input_ids[:, position] == token)
            if found.any():  # not so where the text was resampled
                return int(found.argmax())
        return None

    def record(self) -> CureRecord:
        """An entry of `cures` in scales.json."""
        summary = (
            f"{len(self.limits)} inputs clipped to the range of {self.blocks} of {self.all_blocks} blocks: held-out "
            "text loses more by wider grids than by what is beyond"
        )
        return CureRecord(kind="clip", summary=summary, settings={"tensors": list(self.limits), "blocks": self.blocks})


def _counted(site: Site, *, include_sink: bool) -> Range:
    extent = site.statistics.range
    return extent if include_sink else extent.of(REST)
