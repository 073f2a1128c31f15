# SPDX-License-Identifier: Apache-2.0
"""Distillation frameworks by name: what a student is asked to match, and how strongly."""

from __future__ import annotations

from calib.distill.frameworks.framework import FRAMEWORKS, Framework, make_framework, soft_targets

# importing a family registers its names
from calib.distill.frameworks import logits, published, contrastive, review, hierarchical  # isort: skip

__all__ = [
    "FRAMEWORKS",
    "Framework",
    "contrastive",
    "hierarchical",
    "logits",
    "make_framework",
    "published",
    "review",
    "soft_targets",
]
