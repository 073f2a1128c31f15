# SPDX-License-Identifier: Apache-2.0
"""`Smoothing`: the difficulty of a tensor moved, channel by channel, into the weights that read it.

SmoothQuant (Xiao et al. 2023, equation 4): ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``; the tensor is divided by s,
the weights' columns are multiplied by it. Everything that it needs is in a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from calib.cures.fold import Folded, fold
from calib.cures.pairs import Pair
from calib.errors import UsageError

__all__ = ["LARGEST_SCALE", "Smoothing", "post_smoothing_amax", "smoothing_scales"]

FLOOR = 1e-5
"""Channels are taken to be at least this share of the largest one, so that one that was never used is not blown up;
the floor that the reference implementation of SmoothQuant has, made relative."""
LARGEST_SCALE = 1e4
"""Scales stay within a factor 1e4 of their centre: a float16 weight below 6 then cannot overflow."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Scales for a set of pairs: decided, not yet applied.

    Attributes:
        pairs: what is scaled.
        alphas: per pair, 0 leaves the difficulty with the activation, 1 gives all of it to the weights.
        scales: per pair, float32 ``[channels]``; the activation is divided by them.
        include_sink: whether the first positions of a block counted.
    """

    pairs: tuple[Pair, ...]
    alphas: tuple[float, ...]
    scales: tuple[NDArray[np.float32], ...]
    include_sink: bool = True

    def apply(self, model: nn.Module) -> Folded:
        """Folds the scales into the weights of a model, in place; see `fold`.

        Returns:
            What can be reverted, by `revert()` or by the end of a ``with`` block. It keeps a copy of every parameter
            that was changed; drop it where there is no way back.

        Raises:
            ModelError: the pairs do not fit the model, or a weight would overflow.
        """
        return fold(model, self.pairs, self.scales)

    def without(self, names: Sequence[str]) -> Smoothing:
        """Without the pairs of these names (of pairs or producers)."""
        kept = [i for i, pair in enumerate(self.pairs) if not {pair.name, pair.producer} & set(names)]

        def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in kept)

        return Smoothing(some(self.pairs), some(self.alphas), some(self.scales), self.include_sink)


def smoothing_scales(
    pair: Pair, activation: NDArray[np.floating[Any]], weight: NDArray[np.floating[Any]], alpha: float | NDArray[Any]
) -> NDArray[np.float32]:
    """Scales of one pair: ``activation^alpha / weight^(1 - alpha)``, normalised and bounded.

    A common factor of all scales changes neither the grid of the activation nor that of the consumers' weights, so it
    is free: scales have a geometric mean of 1, or, for a norm that multiplies by 1 + w, a maximum of 1. There w is what
    is stored, and a scale above 1 would push 1 + w to 0 where the rounding of w, near -1, is coarse.

    Args:
        pair: says how the producer multiplies.
        activation: largest magnitude of each channel, over all consumers' inputs that it feeds, ``[channels]``.
        weight: largest magnitude of each channel in the consumers' columns, ``[channels]``.
        alpha: in 0..1, or ``[settings, 1]``.

    Returns:
        float32 ``[channels]``, or ``[settings, channels]``.

    Raises:
        UsageError: alpha is outside of 0..1.
    """
    power = np.asarray(alpha, np.float64)
    if not ((power >= 0) & (power <= 1)).all():
        raise UsageError(f"alpha {alpha}: not in 0..1; 0.5 to 0.9 are usual")
    x, w = _floored(activation), _floored(weight)
    exponent = power * np.log(x) - (1 - power) * np.log(w)
    centre = exponent.mean(-1, keepdims=True)
    limit = np.log(LARGEST_SCALE)
    exponent = np.clip(exponent - centre, -limit, limit)
    if pair.rule == "norm_plus_one":
        exponent = exponent - exponent.max(-1, keepdims=True)
    scales: NDArray[np.float32] = np.exp(exponent).astype(np.float32)
    return scales


def post_smoothing_amax(
    amax: NDArray[np.floating[Any]], channels: NDArray[np.int64], scales: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Largest magnitude of a consumer's whole input once it is divided by the scales: ``max_j amax_j / s_j``.

    Exact: dividing a channel by s divides its extremes by s.

    Args:
        amax: per input channel, ``[inputs]``.
        channels: `Consumer.channels`.
        scales: of its pair, ``[channels]`` or ``[settings, channels]``.

    Returns:
        float64, a number or ``[settings]``.
    """
    divisor = np.where(channels < 0, 1.0, scales.astype(np.float64)[..., channels])
    result: NDArray[np.float64] = (amax.astype(np.float64) / divisor).max(-1)
    return result


def _floored(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """At least `FLOOR` of the largest; a channel that was only ever 0 counts as the usual one, for it says nothing.

    The neuron of a ReLU that stayed silent in this text may fire in other text, as loud as its neighbours. Taken at the
    floor, its scale would be so small that this one channel then makes the range of the whole tensor.
    """
    wide = values.astype(np.float64)
    heard = wide > 0
    if not heard.any():
        return np.ones_like(wide)
    wide[heard] = np.maximum(wide[heard], FLOOR * wide.max())
    wide[~heard] = np.exp(np.log(wide[heard]).mean())
    return wide
