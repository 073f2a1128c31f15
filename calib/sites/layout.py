# SPDX-License-Identifier: Apache-2.0
"""Brings the tensors of all sites to one layout, ``[blocks, tokens, channels]``, as views where strides allow."""

from __future__ import annotations

import torch

from calib.sites.port import Axes

__all__ = ["to_blocks"]


def to_blocks(tensor: torch.Tensor, axes: Axes, batch: tuple[int, int] | None) -> tuple[torch.Tensor, bool]:
    """One layout for all.

    Args:
        tensor: floating point.
        axes: the layout that its port declares.
        batch: (blocks, tokens) of the token ids of this forward pass, if it has any.

    Returns:
        ``[blocks, tokens, channels]``, and whether its first two axes are those of the token ids. Where they are not,
        tokens are patches, pixels or routed rows, whose positions mean something else.
    """
    if axes == "heads" and tensor.ndim == 4:
        tensor = tensor.transpose(1, 2).flatten(2)
    elif axes == "channels_first" and tensor.ndim > 2:
        return tensor.movedim(1, -1).flatten(1, -2), False
    if batch is not None:
        blocks, tokens = batch
        if tensor.ndim == 4 and tuple(tensor.shape[:3]) == (blocks, 1, tokens):  # latents kept as one head
            return tensor.squeeze(1), True
        if tensor.ndim > 2 and tuple(tensor.shape[:2]) == batch:
            return tensor.flatten(2), True
        if tensor.ndim == 2 and tensor.shape[0] == blocks * tokens:
            return tensor.unflatten(0, batch), True
    if tensor.ndim > 2:
        return tensor.flatten(1, -2), False
    return (tensor.unsqueeze(1) if tensor.ndim == 2 else tensor.reshape(1, 1, -1)), False
