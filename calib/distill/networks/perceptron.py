# SPDX-License-Identifier: Apache-2.0
"""Perceptrons with two hidden layers, for vectors and for quick studies."""

from __future__ import annotations

from torch import nn

from calib.distill.networks.registry import NETWORKS

__all__ = ["perceptron"]


def perceptron(width: int, classes: int, channels: int, size: int) -> nn.Module:
    """Inputs `[n, channels, size, size]`, or `[n, channels]` with size 1."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


for _width in (16, 32, 64, 128, 256):
    NETWORKS[f"mlp{_width}"] = lambda classes, channels, size, width=_width: perceptron(  # type: ignore[misc]
        width, classes, channels, size
    )
