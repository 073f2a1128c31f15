# SPDX-License-Identifier: Apache-2.0
"""The augmentation of small images: a random shift by up to an eighth and a horizontal flip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["shifted_and_flipped"]


def shifted_and_flipped(batch: Any) -> Any:
    """Each image padded by 0, cropped at its own place, and flipped or not; random by torch's global generator.

    Args:
        batch: (images `[n, c, h, w]`, labels[, index]).
    """
    images: Tensor = batch[0]
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    padded = nn.functional.pad(images, (pad, pad, pad, pad))
    device = images.device
    top, left = (torch.randint(2 * pad + 1, (count, 1), device=device) for _ in range(2))
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    flip = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    samples = torch.arange(count, device=device)[:, None, None]
    cropped = padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return (cropped.contiguous(), *batch[1:])
