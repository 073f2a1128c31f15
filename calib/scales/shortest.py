# SPDX-License-Identifier: Apache-2.0
"""Numbers as they are written: the shortest decimal that reads back as the same float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.schema.scales import ExpectedError

__all__ = ["shortest", "shortest_error", "shortest_list"]


def shortest(x: float) -> float:
    """The float64 with the fewest decimal digits that rounds to float32(x): 0.1, not 0.10000000149."""
    return float(str(np.float32(x)))


def shortest_list(values: NDArray[Any]) -> list[float]:
    """The same for an array ``[n]``."""
    return [float(str(value)) for value in values.astype(np.float32)]


def shortest_error(error: ExpectedError) -> ExpectedError:
    """An error whose figures are written that way."""
    figures = {name: value for name, value in error.model_dump().items() if name != "estimated"}
    rounded = {name: None if value is None else shortest(value) for name, value in figures.items()}
    return ExpectedError(**rounded, estimated=error.estimated)
