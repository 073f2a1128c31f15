# SPDX-License-Identifier: Apache-2.0
"""Distillation with maximum conditional mutual information: measure CMI, make an MCMI teacher, train students."""

from __future__ import annotations

from calib.distill.cmi import measure_information
from calib.distill.information import ClassInformation, InformationSummary
from calib.distill.mcmi import mcmi_loss
from calib.distill.student import StudentSettings, train_student
from calib.distill.sweep import sweep_strength
from calib.distill.task import CausalLanguageTask, ClassificationTask, TokenTask
from calib.distill.teacher import TeacherSettings, fine_tune, fine_tune_with_control

__all__ = [
    "CausalLanguageTask",
    "ClassInformation",
    "ClassificationTask",
    "InformationSummary",
    "StudentSettings",
    "TeacherSettings",
    "TokenTask",
    "fine_tune",
    "fine_tune_with_control",
    "mcmi_loss",
    "measure_information",
    "sweep_strength",
    "train_student",
]
