# SPDX-License-Identifier: Apache-2.0
"""`Folded`: weights that carry the scales of pairs, and the originals to go back to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.cures.input_rotation import on_columns
from calib.cures.linear import columns_of, is_linear, matrix_of, rows_of
from calib.cures.pairs import Pair
from calib.cures.rules import scaled
from calib.errors import ModelError

__all__ = ["Folded", "fold"]

Scales = NDArray[np.float32]


class Folded:
    """Parameters changed in place. `revert` puts the very bits back, so does the end of a `with` block.

    Attributes:
        names: the parameters that were changed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], originals: dict[str, torch.Tensor]) -> None:
        self._parameters = dict(parameters)
        self._originals = originals
        self._sums = {name: _bit_sum(p) for name, p in self._parameters.items()}
        self.names = tuple(self._parameters)

    @classmethod
    def write(cls, model: nn.Module, values: Iterable[tuple[str, torch.Tensor]], advice: str) -> Self:
        """Writes values into parameters one by one, each rounded once to its dtype.

        Args:
            model: holds the parameters.
            values: name of a parameter and its new value, float32 in its shape; each name once. Made when it is
                their turn, so that not all need be in memory.
            advice: what to do about a value that the dtype cannot hold.

        Raises:
            ModelError: a value does not fit; the model is as it was.
        """
        parameters: dict[str, nn.Parameter] = {}
        originals: dict[str, torch.Tensor] = {}
        try:
            for name, value in values:
                parameter = model.get_parameter(name)
                if not bool((value.abs() <= torch.finfo(parameter.dtype).max).all()):
                    raise ModelError(f"{name}: does not fit {parameter.dtype} {advice}")
                originals[name] = parameter.detach().clone()
                parameters[name] = parameter
                with torch.no_grad():
                    parameter.copy_(value)
            return cls(parameters, originals)
        except BaseException:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(originals[name])
            raise

    def revert(self) -> None:
        """Puts the originals back; a second call does nothing.

        Raises:
            ModelError: a parameter was changed by something else meanwhile, which would be lost; nothing is reverted.
        """
        if not self._originals:
            return
        for name, parameter in self._parameters.items():
            if _bit_sum(parameter) != self._sums[name]:
                raise ModelError(f"{name}: was changed after this cure; revert the later cure first")
        self._restore()

    def _restore(self) -> None:
        with torch.no_grad():
            for name, original in self._originals.items():
                self._parameters[name].copy_(original)
        self._originals = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.revert()
        elif self._originals:
            self._restore()  # an error is on its way already; the model must not stay changed


def fold(model: nn.Module, pairs: Sequence[Pair], scales: Sequence[Scales]) -> Folded:
    """Divides every producer's channels by its scales and multiplies the consumers' columns by them, in place.

    The arithmetic is float32; each parameter is rounded to its dtype once, however many pairs it is in.

    Args:
        model: the model in which the pairs were found, or one like it.
        pairs: what to scale.
        scales: per pair, positive, float32 ``[channels]``.

    Raises:
        ModelError: a module is missing or of another size, or a weight would overflow; the model is as it was.
    """
    changed: dict[str, torch.Tensor] = {}  # by parameter, float32
    for pair, values in zip(pairs, scales, strict=True):
        _check(model, pair, values)
        _scale_producer(model, pair, values, changed)
        for consumer in pair.consumers:
            factor = np.where(consumer.channels < 0, np.float32(1), values[consumer.channels])
            module = model.get_submodule(consumer.module)
            weight = _current(module, consumer.module, "weight", changed)
            column = torch.from_numpy(factor).to(weight)
            cured = on_columns(module, matrix_of(module, weight), partial(torch.mul, column))
            changed[f"{consumer.module}.weight"] = matrix_of(module, cured)
    return Folded.write(model, changed.items(), "after smoothing; choose another alpha")


def _scale_producer(model: nn.Module, pair: Pair, values: Scales, changed: dict[str, torch.Tensor]) -> None:
    module = model.get_submodule(pair.producer)
    channels = rows_of(module) if is_linear(module) else module.get_parameter("weight").numel()
    factor = np.ones(channels, np.float32)
    factor[pair.rows] = np.float32(1) / values
    for key in [k for k, p in module._parameters.items() if p is not None]:
        current = _current(module, pair.producer, key, changed)
        changed[f"{pair.producer}.{key}"] = scaled(
            module, key, current, torch.from_numpy(factor).to(current), pair.rule
        )


def _current(module: nn.Module, name: str, key: str, changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    full = f"{name}.{key}"
    return changed[full] if full in changed else module.get_parameter(key).detach().float()


def _check(model: nn.Module, pair: Pair, values: Scales) -> None:
    if values.shape != pair.rows.shape or not (np.isfinite(values).all() and (values > 0).all()):
        raise ModelError(f"{pair.name}: needs {pair.rows.size} positive scales; compute them from this pair")
    for name, channels, linear in [
        (pair.producer, int(pair.rows.max()) + 1, pair.rule == "linear"),
        *((c.module, c.channels.size, True) for c in pair.consumers),
    ]:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"{name}: is not in {type(model).__name__}; find the pairs in this model") from None
        if linear != is_linear(module):
            raise ModelError(f"{name}: is a {type(module).__name__} here; find the pairs in this model")
        if name == pair.producer:
            size = rows_of(module) if linear else module.get_parameter("weight").numel()
            fits = size == channels if pair.whole else size >= channels
        else:
            size, fits = columns_of(module), columns_of(module) == channels
        if not fits:
            raise ModelError(f"{name}: has {size} channels here, not {channels}; find the pairs in this model")


def _bit_sum(parameter: torch.Tensor) -> int:
    """Sum of the bit patterns: equal for equal bits, and all but surely not for others."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(parameter.detach().contiguous().view(integers[parameter.element_size()]).sum(dtype=torch.int64))
