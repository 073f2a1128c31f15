# SPDX-License-Identifier: Apache-2.0
"""How a tensor answers when the channels of another one are scaled: not at all, in proportion, or otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["TOLERANCE", "Relation", "probe_scales", "same"]

TOLERANCE = 1e-4
"""Relative to the largest value of a token. Float32 noise through a block is below 1e-5, a path that was missed
changes its reader by the scales themselves, a quarter at least."""
_LEAST, _MOST = 1.25, 4.0
_RATIO_TOLERANCE = 1e-5


def probe_scales(count: int, seed: int) -> NDArray[np.float64]:
    """Distinct scales between 1.25 and 4 in random order; neighbours differ by a constant factor, none is 1."""
    grid = np.geomspace(_LEAST, _MOST, count) if count > 1 else np.array([2.0])
    return np.random.default_rng(seed).permutation(grid)


@dataclass(frozen=True, eq=False)
class Relation:
    """Of one reader's input to the scaled channels of a producer.

    Attributes:
        unchanged: the input is the same with and without scaling.
        channels: int64 ``[inputs]``, the scaled row that each input channel is proportional to, -1 where it does not
            depend on any; None if the input is not proportional.
    """

    unchanged: bool
    channels: NDArray[np.int64] | None = None

    @classmethod
    def between(
        cls, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], scales: NDArray[np.float64]
    ) -> Relation:
        """Of the same reads ``[..., inputs]`` before and after scaling by `scales` ``[rows]``."""
        if same(before, after):
            return cls(True)
        if [t.shape for t in before] != [t.shape for t in after] or len({t.shape[-1] for t in before}) != 1:
            return cls(False)
        old = torch.cat([t.reshape(-1, t.shape[-1]) for t in before]).double()
        new = torch.cat([t.reshape(-1, t.shape[-1]) for t in after]).double()
        energy = (old * old).sum(0)
        ratio = ((old * new).sum(0) / torch.where(energy > 0, energy, torch.ones_like(energy))).cpu().numpy()
        channels = _nearest(ratio, scales)
        silent = (energy == 0).cpu().numpy()
        if silent.any():
            # a channel that is always 0 in the probe shows no ratio; the identity is the only map that can be guessed
            identity = np.arange(channels.size)
            if channels.size != scales.size or (channels != identity)[~silent].any():
                return cls(False)
            channels = identity
        if (channels == _NEITHER).any() or (channels < 0).all():
            return cls(False)
        factor = torch.from_numpy(np.where(channels < 0, 1.0, scales[channels])).to(old)
        return cls(False, channels) if same([old * factor], [new]) else cls(False)


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors ``[..., channels]`` are equal but for rounding."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape:
            return False
        if not one.numel():
            continue
        size = one.abs().amax(-1, keepdim=True)
        # not (error > bound), so that NaN is a difference; equal infinities (masks) are none
        close = (one - other).abs() <= TOLERANCE * size
        if not bool((close | (one == other)).all()):
            return False
    return True


_NEITHER = -2


def _nearest(ratio: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.int64]:
    """The row whose scale a ratio equals; -1 if it is 1; `_NEITHER` if it is nothing of the kind."""
    order = np.argsort(scales)
    place = np.clip(np.searchsorted(scales[order], ratio), 1, max(scales.size - 1, 1))
    left, right = order[place - 1], order[np.minimum(place, scales.size - 1)]
    best = np.where(np.abs(scales[left] - ratio) <= np.abs(scales[right] - ratio), left, right)
    found = np.where(np.abs(ratio / scales[best] - 1) <= _RATIO_TOLERANCE, best, _NEITHER)
    return np.asarray(np.where(np.abs(ratio - 1) <= TOLERANCE, -1, found), np.int64)
