# SPDX-License-Identifier: Apache-2.0
"""Quantized models: fake quantization with exact integer semantics, and true INT8 execution."""

from __future__ import annotations

from calib.quantized.grid import IntegerGrid
from calib.quantized.model import QuantizedModel
from calib.quantized.plan import QuantizationPlan
from calib.quantized.planning import plan_from_scales
from calib.quantized.weights import QuantizedWeight, WeightScheme

__all__ = [
    "IntegerGrid",
    "QuantizationPlan",
    "QuantizedModel",
    "QuantizedWeight",
    "WeightScheme",
    "plan_from_scales",
]
