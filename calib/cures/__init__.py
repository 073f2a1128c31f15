# SPDX-License-Identifier: Apache-2.0
"""Changes of a model that keep its function and make its tensors easier to quantize."""

from __future__ import annotations

from calib.cures.find import find_pairs
from calib.cures.fold import Folded, fold
from calib.cures.input_rotation import InputRotation
from calib.cures.offline import OfflineRotation
from calib.cures.pairs import Consumer, Pair, Pairs
from calib.cures.record import load_smoothing, save_smoothing, smoothing_record
from calib.cures.result import Cured, CureOptions
from calib.cures.rotate import OnlineRotation, Rotated
from calib.cures.scale import OnlineScaling
from calib.cures.search import find_cure
from calib.cures.smooth import Smoothing, post_smoothing_amax, smoothing_scales
from calib.cures.sweep import SmoothingSweep

__all__ = [
    "Consumer",
    "CureOptions",
    "Cured",
    "Folded",
    "InputRotation",
    "OfflineRotation",
    "OnlineRotation",
    "OnlineScaling",
    "Pair",
    "Pairs",
    "Rotated",
    "Smoothing",
    "SmoothingSweep",
    "find_cure",
    "find_pairs",
    "fold",
    "load_smoothing",
    "post_smoothing_amax",
    "save_smoothing",
    "smoothing_record",
    "smoothing_scales",
]
