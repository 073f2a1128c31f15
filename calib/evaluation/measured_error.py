# SPDX-License-Identifier: Apache-2.0
"""`MeasuredError`: how far a tensor is from the one it stands for, summed over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from calib.errors import GateError

__all__ = ["ErrorSum", "MeasuredError"]


@dataclass(frozen=True)
class MeasuredError:
    """Figures of one tensor, defined as those of `ExpectedError`.

    Attributes:
        sqnr_db: 10 log10(sum x^2 / sum (x - y)^2); None if nothing differs.
        rel_mae: sum abs(x - y) / sum abs(x).
        zeroed: share of values that are not 0 in x and are 0 in y.
        values: how many values were compared.
    """

    sqnr_db: float | None
    rel_mae: float
    zeroed: float
    values: int


class ErrorSum:
    """Adds up float64 sums on the device of the tensors; nothing is read back before `error`.

    Args:
        name: of the tensor, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sums: torch.Tensor | None = None

    def add(self, exact: torch.Tensor, other: torch.Tensor) -> None:
        """Compares two tensors of one shape."""
        x, y = exact.detach().float(), other.detach().float()
        difference = y - x
        sums = [
            x.square().sum(dtype=torch.float64),
            difference.square().sum(dtype=torch.float64),
            x.abs().sum(dtype=torch.float64),
            difference.abs().sum(dtype=torch.float64),
            ((x != 0) & (y == 0)).sum(dtype=torch.float64),
            torch.tensor(x.numel(), dtype=torch.float64, device=x.device),
        ]
        together = torch.stack(sums)
        self._sums = together if self._sums is None else self._sums + together

    @property
    def empty(self) -> bool:
        """Whether nothing was compared yet."""
        return self._sums is None

    def error(self) -> MeasuredError | None:
        """The figures; None if nothing was compared.

        Raises:
            GateError: a value was NaN or infinite.
        """
        if self._sums is None:
            return None
        energy, noise, magnitude, absolute, zeroed, count = self._sums.tolist()
        if not math.isfinite(energy + noise + magnitude + absolute):
            raise GateError(f"{self._name}: NaN or infinite values in the evaluation; check scales, data and dtype")
        sqnr = 10 * math.log10(energy / noise) if energy > 0 and noise > 0 else None
        return MeasuredError(sqnr, absolute / magnitude if magnitude else 0.0, zeroed / max(count, 1), int(count))
