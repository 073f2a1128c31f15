# SPDX-License-Identifier: Apache-2.0
"""Ways to ask whether a teacher is better: few samples, classes never shown, temperatures, where it looks."""

from __future__ import annotations

from calib.distill.protocols.augmentation import shifted_and_flipped
from calib.distill.protocols.condition import Condition
from calib.distill.protocols.eigencam import CamComparison, compare_cams, covered_area, eigen_cam
from calib.distill.protocols.few_shot import few_shot_conditions
from calib.distill.protocols.temperature import TemperaturePoint, temperature_study
from calib.distill.protocols.zero_shot import ZeroShotResult, confusion_matrix, without_classes, zero_shot_result

__all__ = [
    "CamComparison",
    "Condition",
    "TemperaturePoint",
    "ZeroShotResult",
    "compare_cams",
    "confusion_matrix",
    "covered_area",
    "eigen_cam",
    "few_shot_conditions",
    "shifted_and_flipped",
    "temperature_study",
    "without_classes",
    "zero_shot_result",
]
