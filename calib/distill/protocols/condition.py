# SPDX-License-Identifier: Apache-2.0
"""`Condition`: what one student gets to see of the training data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from calib.distill.data import Records

__all__ = ["Condition"]


@dataclass(frozen=True)
class Condition:
    """A name, the records that the student sees, and the classes that are left out of them."""

    name: str
    records: Records
    omitted: tuple[int, ...] = ()

    @property
    def per_class(self) -> int:
        """The smallest number of samples of a class that is there."""
        return min(Counter(self.records.labels).values())
