# SPDX-License-Identifier: Apache-2.0
"""Methods: rules that pick a range for a tensor. One file each; a new one registers itself and is imported here."""

from __future__ import annotations

from calib.scales.methods import absmax as absmax
from calib.scales.methods import entropy as entropy
from calib.scales.methods import mse as mse
from calib.scales.methods import percentile as percentile
from calib.scales.methods.registry import METHODS, BoundMethod, Method, Parameter, method, parse_method

__all__ = ["METHODS", "BoundMethod", "Method", "Parameter", "method", "parse_method"]
