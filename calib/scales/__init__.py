# SPDX-License-Identifier: Apache-2.0
"""Scales: from a measurement to a grid for every tensor, with the error to expect. Needs neither model nor PyTorch."""

from __future__ import annotations

from calib.scales.choose import choose_scales
from calib.scales.compare import MethodRow, compare_methods
from calib.scales.distribution import Distribution
from calib.scales.divergence import kl_divergence
from calib.scales.error import expected_error
from calib.scales.file import json_schema, load_scales, save_scales
from calib.scales.float8 import float8_error
from calib.scales.grid import Grid, Step
from calib.scales.measured import measured_error
from calib.scales.methods import METHODS, Method, parse_method
from calib.scales.varying import dynamic_per_token_error
from calib.scales.verdict import Judgement

__all__ = [
    "METHODS",
    "Distribution",
    "Grid",
    "Judgement",
    "Method",
    "MethodRow",
    "Step",
    "choose_scales",
    "compare_methods",
    "dynamic_per_token_error",
    "expected_error",
    "float8_error",
    "json_schema",
    "kl_divergence",
    "load_scales",
    "measured_error",
    "parse_method",
    "save_scales",
]
