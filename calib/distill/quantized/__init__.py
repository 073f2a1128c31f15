# SPDX-License-Identifier: Apache-2.0
"""Students that are easy to quantize: rounded while they are trained, their peaks held down, then deployed."""

from __future__ import annotations

from calib.distill.quantized.aware import QuantizationAware
from calib.distill.quantized.peak_term import PeakTerm
from calib.distill.quantized.settings import FakeQuantization, PeakControl

__all__ = ["FakeQuantization", "PeakControl", "PeakTerm", "QuantizationAware"]
