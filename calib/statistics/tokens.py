# SPDX-License-Identifier: Apache-2.0
"""Token maxima: the distribution of the largest magnitude per token, by which dynamic per-token scales are judged."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.statistics.histogram import FloatHistogram
from calib.statistics.observation import Observation

__all__ = ["token_maxima"]


def token_maxima(values: NDArray[np.float32], context: Observation) -> FloatHistogram:
    """Histogram over tokens of max over channels of abs(x), ``[blocks, tokens, channels]`` -> one value per token.

    A token without a finite value counts as 0. The law is that of `FloatHistogram`.
    """
    finite = np.where(np.isfinite(values), np.abs(values), np.float32(0))
    return FloatHistogram.observe(finite.max(axis=2, keepdims=True), context)
