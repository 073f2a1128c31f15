# SPDX-License-Identifier: Apache-2.0
"""`SmoothingSweep`: what any alpha would do to every pair, from a measurement alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cures.pairs import Consumer, Pair
from calib.cures.smooth import Smoothing, post_smoothing_amax, smoothing_scales
from calib.errors import ArtifactError, UsageError
from calib.measurement import Measurement, Site, WeightSite
from calib.statistics import REST, ChannelStatistics

__all__ = ["SmoothingSweep"]

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
SEARCHED = tuple(alpha for alpha in ALPHAS if 0.5 <= alpha <= 0.9)
"""What published recipes use: 0.5 in the paper's for OPT, up to 0.9 for models with strong outliers."""


@dataclass(frozen=True, eq=False)
class _Input:
    """A consumer with what was measured of its input and weight.

    Attributes:
        amax: of the input per channel, float32 ``[inputs]``.
        mean_square: of the input per channel, without the first positions of a block (one of which may weigh more than
            all others together), float64 ``[inputs]``.
        columns: largest weight per column, float32 ``[inputs]``.
        column_spread: mean square of a column's weights over the square of the largest, averaged over the columns.
        row_exponent: p for which the p-norm over the columns' mean squares gives the mean square of a row's largest
            weight: infinite where one column is the largest of every row, smaller the more columns compete.
        rows: number of outputs.
    """

    consumer: Consumer
    amax: NDArray[np.float32]
    mean_square: NDArray[np.float64]
    columns: NDArray[np.float32]
    column_spread: float
    row_exponent: float
    rows: int


class SmoothingSweep:
    """All pairs of a model with their measurement.

    Args:
        pairs: from `find_pairs`.
        measurement: of the same model, before this cure, with channel statistics of the linear inputs.
        include_sink: whether the first positions of a block count. Leave them out where a prefix will take the
            attention sinks out of the quantized range.

    Raises:
        ArtifactError: the measurement lacks an input or a weight of a pair.
    """

    def __init__(self, pairs: Iterable[Pair], measurement: Measurement, *, include_sink: bool = True) -> None:
        self.pairs = tuple(pairs)
        self.include_sink = include_sink
        sites: dict[str, list[Site]] = {}
        for site in measurement.sites.values():
            for name in (site.name, *site.aliases):
                sites.setdefault(name.partition("#")[0], []).append(site)
        weights = {m: w for w in measurement.weights.values() for m in (w.module, *w.tied)}
        self._inputs = [
            [_input(consumer, sites, weights, include_sink=include_sink) for consumer in pair.consumers]
            for pair in self.pairs
        ]

    def scales(self, number: int, alphas: Sequence[float]) -> NDArray[np.float32]:
        """Scales of one pair, float32 ``[alphas, channels]``."""
        pair = self.pairs[number]
        x, w = np.zeros(pair.channels), np.zeros(pair.channels)
        for one in self._inputs[number]:
            fed = one.consumer.channels >= 0
            np.maximum.at(x, one.consumer.channels[fed], one.amax[fed])
            np.maximum.at(w, one.consumer.channels[fed], one.columns[fed])
        return smoothing_scales(pair, x, w, np.asarray(alphas, np.float64)[:, None])

    def amax(self, alphas: Sequence[float] = ALPHAS) -> dict[str, NDArray[np.float64]]:
        """Largest magnitude of each consumer's input after smoothing, exact: module -> float64 ``[alphas]``."""
        result: dict[str, NDArray[np.float64]] = {}
        for number, inputs in enumerate(self._inputs):
            scales = self.scales(number, alphas)
            for one in inputs:
                result[one.consumer.module] = post_smoothing_amax(one.amax, one.consumer.channels, scales)
        return result

    def expected_error(self, alphas: Sequence[float] = ALPHAS, *, bits: int = 8) -> NDArray[np.float64]:
        """Power of the error that static quantization leaves in the consumers' outputs, float64 ``[pairs, alphas]``.

        Rounding noise of a step D has power D^2 / 12, or the power of the channel itself where all of it rounds to 0.
        The activation's (one step for the tensor) passes the squared columns; the weights' (one step per row) passes
        the squared activations. A measurement holds the largest weight of each column and row; the energy of columns
        and, after smoothing, the largest weights of rows are estimated from them. Noise is taken to be uncorrelated:
        where a coarse step turns most of a sparse tensor into 0 (down_proj at a high alpha), this is too optimistic.
        """
        levels = 2 ** (bits - 1) - 1
        result = np.zeros((len(self.pairs), len(alphas)))
        for number, inputs in enumerate(self._inputs):
            scales = self.scales(number, alphas).astype(np.float64)
            for one in inputs:
                s = np.where(one.consumer.channels < 0, 1.0, scales[:, one.consumer.channels])
                columns = one.columns * s
                power = one.mean_square / s**2
                step = (one.amax / s).max(1, keepdims=True) / levels
                weight_step_square = _row_square(columns, one.column_spread, one.row_exponent) / levels**2
                of_activation = (np.minimum(step**2 / 12, power) * columns**2).sum(1) * one.column_spread
                of_weight = weight_step_square / 12 * power.sum(1)
                result[number] += one.rows * (of_activation + of_weight)
        return result

    def smoothing(self, alpha: float | Mapping[str, float]) -> Smoothing:
        """Scales for one alpha, or for one per pair name.

        Raises:
            UsageError: alpha is outside of 0..1, or a pair has none.
        """
        alphas = []
        for pair in self.pairs:
            if not isinstance(alpha, Mapping):
                alphas.append(float(alpha))
            elif pair.name in alpha:
                alphas.append(float(alpha[pair.name]))
            else:
                raise UsageError(f"alpha: none is given for {pair.name}; give one for every pair")
        scales = tuple(self.scales(number, [alphas[number]])[0] for number in range(len(self.pairs)))
        return Smoothing(self.pairs, tuple(alphas), scales, self.include_sink)

    def best(self, alphas: Sequence[float] = SEARCHED, *, bits: int = 8) -> Smoothing:
        """Scales with the alpha of least `expected_error`, pair by pair; the smaller alpha where two are equal.

        A first guess where nothing can be run. One alpha for all pairs, chosen by evaluating the quantized model, was
        better on the model that we tried.
        """
        chosen = self.expected_error(alphas, bits=bits).argmin(1)
        return self.smoothing({pair.name: alphas[k] for pair, k in zip(self.pairs, chosen, strict=True)})


def _input(
    consumer: Consumer, sites: Mapping[str, list[Site]], weights: Mapping[str, WeightSite], *, include_sink: bool
) -> _Input:
    found = sites.get(f"{consumer.module}:input", [])
    weight = weights.get(consumer.module)
    if not found or weight is None:
        missing = "input" if not found else "weight"
        raise ArtifactError(f"{consumer.module}: the measurement has no {missing} of it; measure linear_input sites")
    channels: ChannelStatistics | None = None
    count = 0
    for site in found:  # several where a module is called more than once
        statistics = site.statistics
        if statistics.channels is None:
            raise ArtifactError(f"{site.name}: was measured without channels; measure with full statistics")
        channels = statistics.channels if channels is None else channels.merge(statistics.channels)
        count += int(statistics.range.count[REST])
    assert channels is not None
    columns = weight.statistics.column_amax
    if channels.minimum.shape[1] != consumer.channels.size or columns.size != consumer.channels.size:
        raise ArtifactError(f"{consumer.module}: the measurement is of another model; measure this one")
    groups = slice(None) if include_sink else slice(REST, REST + 1)
    amax = np.maximum(np.maximum(channels.maximum, -channels.minimum)[groups].max(0), np.float32(0))
    tokens = max(count / consumer.channels.size, 1.0)
    rows = np.maximum(weight.statistics.row_max, -weight.statistics.row_min).astype(np.float64)
    mean = float(np.square(columns.astype(np.float64)).mean())
    spread = weight.statistics.range.rms**2 / mean if mean > 0 else 0.0
    power = channels.sum_of_squares[REST] / tokens
    return _Input(
        consumer,
        amax,
        power,
        columns,
        spread,
        _row_exponent(columns, spread, float(np.square(rows).mean())),
        rows.size,
    )


def _row_square(columns: NDArray[np.floating[Any]], spread: float, exponent: float) -> NDArray[np.float64]:
    """Estimated mean square of a row's largest weight, from the columns' largest ``[..., inputs]``."""
    squares = spread * np.square(columns.astype(np.float64))
    largest = np.maximum(squares.max(-1, keepdims=True), np.finfo(np.float64).tiny)
    result: NDArray[np.float64] = largest[..., 0] * ((squares / largest) ** exponent).sum(-1) ** (1 / exponent)
    return result


def _row_exponent(columns: NDArray[np.floating[Any]], spread: float, measured: float) -> float:
    """The exponent, in 1..64, with which `_row_square` gives what was measured; it falls as the exponent grows."""
    low, high = 0.0, 6.0  # powers of two
    for _ in range(30):
        middle = (low + high) / 2
        if _row_square(columns, spread, 2.0**middle) > measured:
            low = middle
        else:
            high = middle
    return float(2.0**low)
