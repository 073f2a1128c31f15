# SPDX-License-Identifier: Apache-2.0
"""`InputScaling`: a factor for each channel that a linear layer reads, multiplied as they arrive."""

from __future__ import annotations

import torch

from calib.errors import UsageError
from calib.quantized.recent import Recent

__all__ = ["InputScaling"]


class InputScaling:
    """``x -> x * f`` with one factor per channel.

    Args:
        factors: above 0, float32 ``[channels]``, values that bfloat16 holds: a model multiplies by the same numbers in
            whatever dtype it computes.

    Raises:
        UsageError: a factor is 0 or less, not finite, or no value of bfloat16.
    """

    done = "scaled"

    def __init__(self, factors: torch.Tensor) -> None:
        usable = (factors > 0) & factors.isfinite() & (factors == factors.bfloat16())
        if factors.ndim != 1 or not bool(usable.all()):
            raise UsageError("input scaling: needs a positive bfloat16 number for each channel; compute them anew")
        self.factors = factors.float()
        self._recent: Recent[torch.Tensor] = Recent()

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """``x * f`` for ``[..., channels]``, in the dtype of x."""
        return x * self.factors.to(x.device, x.dtype)

    def change_once(self, x: torch.Tensor) -> torch.Tensor:
        """`change`, or its last result if that is of this very tensor: q, k and v read one."""
        return self._recent.of(x, self, lambda: self.change(x))

    def forget(self) -> None:
        """Lets go of the last result."""
        self._recent.forget()
