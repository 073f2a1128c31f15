# SPDX-License-Identifier: Apache-2.0
"""How a student is prepared for quantization while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from calib.errors import UsageError

__all__ = ["FakeQuantization", "PeakControl", "PeakTermName"]

PeakTermName = Literal["peak_to_mean", "peak", "kurtosis", "l4", "range"]


@dataclass(frozen=True)
class FakeQuantization:
    """The forward pass of the student as its deployment will compute it.

    Attributes:
        weight_bits: 2 to 8; None leaves weights in float.
        activation_bits: of the inputs of linear layers and convolutions, per tensor, symmetric; None likewise.
        step: of activations. ``lsq``: learned (Esser et al. 2020, arXiv 1902.08153). ``pact``: a learned clip, decayed
            as weights are (Choi et al. 2018, arXiv 1805.06085). ``absmax``: of each batch.
        weight_step: ``absmax`` of each output row, as calib's scales have it, or ``lsq``.
        start: share of the training that is in float first.
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    step: Literal["lsq", "pact", "absmax"] = "lsq"
    weight_step: Literal["absmax", "lsq"] = "absmax"
    start: float = 0.0

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weight_bits), ("activations", self.activation_bits)):
            if bits is not None and not 2 <= bits <= 8:
                raise UsageError(f"{what} of {bits} bits: pass 2 to 8, or nothing for float")
        if self.weight_bits is None and self.activation_bits is None:
            raise UsageError("fake quantization: neither weights nor activations are quantized; give one of them bits")
        if not 0 <= self.start < 1:
            raise UsageError(f"start {self.start}: not in [0, 1); pass the share of the training that is in float")


@dataclass(frozen=True)
class PeakControl:
    """A term of the loss against values that stand out.

    Attributes:
        term: ``peak_to_mean``: max|A| / mean|A|, mean over sites. ``peak``: max|A| / rms(A), mean over sites, whose
            gradient vanishes where one value makes up the rms. ``kurtosis``: mean(A^4) / mean(A^2)^2 of activations,
            mean over sites (Nrusimha et al. 2024, arXiv 2404.03605, who train on layer outputs). ``l4``:
            mean((A / 3)^4) of the residual stream, mean over sites (TWEO, arXiv 2511.23225). ``range``: max|W|, mean
            over the weights of projections (R2 loss, Kundu et al. 2023, arXiv 2303.08253).
        share: of the loss. The weight follows from it in each step, so that it needs no tuning as the loss falls.
        sites: patterns as of `calib measure --sites`; by default inputs of projections, the residual stream, and
            in blocks also what projections, attention and feed-forward halves write; for ``l4`` the residual stream.
    """

    term: PeakTermName = "peak_to_mean"
    share: float = 0.03
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.term not in (known := get_args(PeakTermName)):
            raise UsageError(f"peak term {self.term!r}: unknown; choose one of {', '.join(known)}")
        if not 0 < self.share < 1:
            raise UsageError(f"share {self.share} of the peak term: not between 0 and 1; pass for example 0.03")
        if self.sites and self.term == "range":
            raise UsageError("sites: the term range is about weights; leave the sites out")
