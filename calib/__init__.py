# SPDX-License-Identifier: Apache-2.0
"""calib: measure activations once, decide on quantization forever.

The public names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "calib.measurement",
    "MeasureOptions": "calib.measurement",
    "Measurement": "calib.measurement",
    "measure": "calib.measurement",
    "build_blocks": "calib.corpus",
    "open_model": "calib.models",
    "ScaleFile": "calib.schema.scales",
    "choose_scales": "calib.scales",
    "compare_methods": "calib.scales",
    "load_scales": "calib.scales",
    "save_scales": "calib.scales",
    "CureOptions": "calib.cures",
    "find_cure": "calib.cures",
    "QuantizationPlan": "calib.quantized",
    "QuantizedModel": "calib.quantized",
    "plan_from_scales": "calib.quantized",
    "export_scales": "calib.export",
    "verify_export": "calib.export",
    "write_checkpoint": "calib.export",
    "fine_tune_with_control": "calib.distill",
    "measure_information": "calib.distill",
    "train_student": "calib.distill",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calib' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
