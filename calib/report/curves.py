# SPDX-License-Identifier: Apache-2.0
"""Learning curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UsageError

if TYPE_CHECKING:
    from calib.distill.training_log import LoggedEpoch

__all__ = ["draw_curves"]

Point = tuple[float, float]

# Okabe & Ito: eight colours that colour-blind readers tell apart, without the yellow that paper swallows
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SCALE = 2  # drawn twice as large and reduced: lines without steps
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LEGEND = 960, 460, 70, 40, 50, 20
_DASH = 12
_MOST = 14  # lines that a legend can name


def draw_curves(epochs: Sequence[LoggedEpoch], path: Path) -> list[str]:
    """Loss by optimiser step of each training, logarithmic, as PNG.

    Seeds of one training share a colour; its name is what stands before ``seed``'s number. With more than 14 kinds of
    training the first are drawn, and the names of the others returned.

    Args:
        epochs: rows of a log.
        path: the file to write.

    Returns:
        Kinds of training that were left out.

    Raises:
        UsageError: Pillow is not installed, or there is nothing to draw.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("learning curves: drawing needs Pillow; pip install 'calib[distill]'") from error
    trainings: dict[str, list[LoggedEpoch]] = {}
    for row in epochs:
        if math.isfinite(row.loss) and row.loss > 0:
            trainings.setdefault(row.training, []).append(row)
    if not trainings:
        raise UsageError("learning curves: the log holds no positive loss; train at least one epoch")
    kinds = list(dict.fromkeys(map(_kind, trainings)))
    shown, left_out = kinds[:_MOST], kinds[_MOST:]
    legend = _LEGEND * math.ceil(len(shown) / 2)
    picture = Image.new("RGB", (_WIDTH * _SCALE, (_HEIGHT + legend) * _SCALE), "white")
    _Drawing(picture, [row for name, rows in trainings.items() if _kind(name) in shown for row in rows]).all(
        {name: rows for name, rows in trainings.items() if _kind(name) in shown}, shown
    )
    picture.resize((_WIDTH, _HEIGHT + legend), Image.Resampling.LANCZOS).save(path)
    return left_out


def _kind(training: str) -> str:
    """A training without its seed: `seed 3, full: student by kd of mll` -> `full: student by kd of mll`."""
    words = training.partition(", ")
    return words[2] if words[0].startswith("seed ") and words[2] else training


class _Drawing:
    def __init__(self, picture: Any, rows: list[LoggedEpoch]) -> None:
        from PIL import ImageDraw, ImageFont

        self.draw = ImageDraw.Draw(picture)
        self.font = ImageFont.load_default(13 * _SCALE)
        self.steps = max(row.steps for row in rows)
        self.low = math.log10(min(row.loss for row in rows))
        self.high = math.log10(max(row.loss for row in rows))
        margin = max(0.05 * (self.high - self.low), 0.02)
        self.low, self.high = self.low - margin, self.high + margin

    def all(self, trainings: dict[str, list[LoggedEpoch]], kinds: list[str]) -> None:
        self._frame()
        for name, rows in trainings.items():
            number = kinds.index(_kind(name))
            points = [(self._x(row.steps), self._y(math.log10(row.loss))) for row in rows]
            colour = _COLOURS[number % len(_COLOURS)]
            if len(points) > 1 and number < len(_COLOURS):
                self.draw.line(points, fill=colour, width=3, joint="curve")
            elif len(points) > 1:  # the second round of colours is dashed
                for dash in _dashes(points):
                    self.draw.line(dash, fill=colour, width=3)
            x, y = points[-1]
            self.draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        for number, kind in enumerate(kinds):
            x = (_LEFT + (number % 2) * (_WIDTH - _LEFT) // 2) * _SCALE
            y = (_HEIGHT + (number // 2) * _LEGEND - 6) * _SCALE
            colour = _COLOURS[number % len(_COLOURS)]
            ends = [(x, x + 44)] if number < len(_COLOURS) else [(x, x + 18), (x + 26, x + 44)]
            for start, end in ends:
                self.draw.line([(start, y + 16), (end, y + 16)], fill=colour, width=6)
            self.draw.text((x + 56, y), kind, fill="black", font=self.font)

    def _frame(self) -> None:
        left, right = _LEFT * _SCALE, (_WIDTH - 20) * _SCALE
        top, bottom = _TOP * _SCALE, (_HEIGHT - _BOTTOM) * _SCALE
        for value in _ticks(self.low, self.high):
            y = self._y(math.log10(value))
            self.draw.line([(left, y), (right, y)], fill="#dddddd", width=2)
            self.draw.text((left - 12, y), f"{value:g}", fill="black", font=self.font, anchor="rm")
        for quarter in range(5):
            step = round(self.steps * quarter / 4)
            x = self._x(step)
            self.draw.line([(x, bottom), (x, bottom + 8)], fill="black", width=2)
            self.draw.text((x, bottom + 12), f"{step:,}", fill="black", font=self.font, anchor="mt")
        self.draw.line([(left, top), (left, bottom), (right, bottom)], fill="black", width=2)
        self.draw.text((left, top - 14), "training loss, mean of an epoch", fill="black", font=self.font, anchor="lb")
        self.draw.text((right, bottom - 10), "optimiser steps", fill="black", font=self.font, anchor="rb")

    def _x(self, step: float) -> float:
        return (_LEFT + (_WIDTH - 20 - _LEFT) * step / self.steps) * _SCALE

    def _y(self, logarithm: float) -> float:
        share = (logarithm - self.low) / (self.high - self.low)
        return (_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share) * _SCALE


def _dashes(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    """Pieces of a line, one _DASH long and one _DASH apart."""
    for (x, y), (right, low) in pairwise(points):
        pieces = max(1, round(math.hypot(right - x, low - y) / _DASH) | 1)  # odd: the line begins and ends with a dash
        at = [(x + (right - x) * n / pieces, y + (low - y) * n / pieces) for n in range(pieces + 1)]
        yield from zip(at[::2], at[1::2], strict=True)


def _ticks(low: float, high: float) -> list[float]:
    """Values 1, 2, 5 times a power of ten between 10^low and 10^high; finer where fewer than three fit."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), tuple(1 + k / 20 for k in range(180))):
        found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 6)]
    return [10 ** ((low + high) / 2)]
