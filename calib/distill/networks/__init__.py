# SPDX-License-Identifier: Apache-2.0
"""Image classifiers in the sizes that distillation papers use for 32 x 32 pixels, and small ones of texts, by name."""

from __future__ import annotations

from calib.distill.networks.registry import NETWORKS, make_network
from calib.distill.networks.text import TEXT_NETWORKS, make_text_network

# importing a family registers its names
from calib.distill.networks import mobilenet, perceptron, resnet, shufflenet, vgg, vit, wide_resnet  # isort: skip

__all__ = [
    "NETWORKS",
    "TEXT_NETWORKS",
    "make_network",
    "make_text_network",
    "mobilenet",
    "perceptron",
    "resnet",
    "shufflenet",
    "vgg",
    "vit",
    "wide_resnet",
]
