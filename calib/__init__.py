# SPDX-License-Identifier: Apache-2.0
"""calib: measure activations once, decide on quantization forever."""

from __future__ import annotations

__version__ = "0.1.0"
