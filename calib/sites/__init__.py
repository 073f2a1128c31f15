# SPDX-License-Identifier: Apache-2.0
"""Where tensors can be seen in a model, found from the model itself."""

from __future__ import annotations

from calib.sites.discovery import find_ports
from calib.sites.port import KINDS, Port
from calib.sites.selection import Selection
from calib.sites.weights import Weight, find_weights

__all__ = ["KINDS", "Port", "Selection", "Weight", "find_ports", "find_weights"]
