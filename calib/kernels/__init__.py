# SPDX-License-Identifier: Apache-2.0
"""How statistics are updated: one kernel call per tensor. `make_kernel` is the only place where one is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from calib.errors import UsageError

if TYPE_CHECKING:
    import torch

    from calib.kernels.plan import RowPlan
    from calib.statistics.site import SiteStatistics

__all__ = ["KERNELS", "Accumulator", "Kernel", "make_kernel"]

KERNELS = ("auto", "fused", "torch")


class Accumulator(Protocol):
    """What one site keeps between batches."""

    def update(self, values: torch.Tensor, plan: RowPlan) -> None:
        """Takes in one batch, ``[blocks, tokens, channels]``."""

    def result(self) -> SiteStatistics:
        """The statistics of all batches so far, a copy."""


class Kernel(Protocol):
    """Makes accumulators, and holds what they share."""

    full: bool

    @property
    def name(self) -> str:
        """What files record."""

    def accumulator(self, channels: int) -> Accumulator:
        """A new, empty accumulator for one site."""

    def close(self) -> None:
        """Releases threads."""


def make_kernel(name: str = "auto", *, device: str = "cpu", full: bool = True, threads: int = 1) -> Kernel:
    """Chooses a kernel.

    Args:
        name: ``fused`` (numba, CPU), ``torch`` (any device), or ``auto``: fused on the CPU if numba can be imported.
        device: type of the device that tensors live on.
        full: all statistics, or ranges and document maxima only.
        threads: workers of the fused kernel. Results do not depend on it.

    Raises:
        UsageError: unknown name, or a kernel that this device or installation cannot run.
    """
    from calib.kernels.reference import TorchKernel

    if name not in KERNELS:
        raise UsageError(f"--kernel {name}: unknown; choose one of {', '.join(KERNELS)}")
    if name == "torch" or (name == "auto" and device != "cpu"):
        return TorchKernel(full=full)
    if device != "cpu":
        raise UsageError(f"--kernel {name}: runs on the CPU only, the model is on {device}; use --kernel torch")
    try:
        from calib.kernels.fused import FusedKernel
    except ImportError as error:
        if name == "auto":
            return TorchKernel(full=full)
        raise UsageError(f"--kernel {name}: numba is missing ({error}); pip install numba, or use torch") from None
    return FusedKernel(threads, full=full)
