# SPDX-License-Identifier: Apache-2.0
"""The registry of methods: each is one function from a distribution and a grid to a range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from calib.errors import UsageError
from calib.scales.distribution import Distribution
from calib.scales.grid import Grid, Step

__all__ = ["METHODS", "BoundMethod", "Method", "Parameter", "method", "parse_method"]

Choose = Callable[[Distribution, Grid, float], tuple[float, float]]


@dataclass(frozen=True)
class Parameter:
    """The number that may follow a method's name after a colon.

    Attributes:
        default: taken where none is given.
        low: values must be greater than this.
        high: values must be at most this.
        meaning: in words, with the unit.
    """

    default: float
    low: float
    high: float
    meaning: str


@dataclass(frozen=True)
class Method:
    """A rule that picks a range.

    Attributes:
        name: as the user writes it.
        summary: one line for `calib methods`.
        choose: from distribution, grid and parameter to the ends of the range.
        parameter: what may follow the name; None if nothing may.
        needs_histogram: exact extremes alone do not suffice.
    """

    name: str
    summary: str
    choose: Choose
    parameter: Parameter | None = None
    needs_histogram: bool = True


METHODS: dict[str, Method] = {}
"""All methods by name, in the order in which they are listed."""


@dataclass(frozen=True)
class BoundMethod:
    """A method with its parameter.

    Attributes:
        label: as it is recorded, e.g. "percentile:99.99".
        method: the rule.
        parameter: its number; NaN if it takes none.
    """

    label: str
    method: Method
    parameter: float

    def step(self, distribution: Distribution, grid: Grid) -> Step | None:
        """The grid that the method chooses; None where no usable scale exists: all values are 0 or nearly so."""
        if grid.step(distribution.minimum, distribution.maximum) is None:
            return None
        chosen = grid.step(*self.method.choose(distribution, grid, self.parameter))
        # a method that clips everything that is not 0 has chosen nothing
        return chosen or grid.step(distribution.minimum, distribution.maximum)


def method(
    name: str, *, summary: str, parameter: Parameter | None = None, needs_histogram: bool = True
) -> Callable[[Choose], Choose]:
    """Registers a function as the method of that name."""

    def register(choose: Choose) -> Choose:
        METHODS[name] = Method(name, summary, choose, parameter, needs_histogram)
        return choose

    return register


def parse_method(text: str) -> BoundMethod:
    """From ``name`` or ``name:number``.

    Raises:
        UsageError: no such method, or a parameter that it does not take.
    """
    name, colon, number = text.strip().partition(":")
    if name not in METHODS:
        raise UsageError(f"method '{name}': unknown; choose one of {', '.join(METHODS)}")
    found = METHODS[name]
    if not colon:
        if found.parameter is None:
            return BoundMethod(name, found, math.nan)
        return BoundMethod(f"{name}:{found.parameter.default:g}", found, found.parameter.default)
    if found.parameter is None:
        raise UsageError(f"method '{text}': {name} takes no parameter; write '{name}'")
    limits = found.parameter
    valid = f"give {limits.meaning}, above {limits.low:g} and up to {limits.high:g}, e.g. {name}:{limits.default:g}"
    try:
        value = float(number)
    except ValueError:
        raise UsageError(f"method '{text}': '{number}' is not a number; {valid}") from None
    if not limits.low < value <= limits.high:
        raise UsageError(f"method '{text}': {number} is out of range; {valid}")
    return BoundMethod(f"{name}:{value!r}".removesuffix(".0"), found, value)
