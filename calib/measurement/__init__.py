# SPDX-License-Identifier: Apache-2.0
"""Runs a model over a corpus and keeps what was seen."""

from __future__ import annotations

from calib.measurement.artifact import Measurement
from calib.measurement.calibration import Calibration
from calib.measurement.engine import MeasureOptions, measure
from calib.measurement.site import Gate, Site, WeightSite

__all__ = ["Calibration", "Gate", "MeasureOptions", "Measurement", "Site", "WeightSite", "measure"]
