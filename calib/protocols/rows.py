# SPDX-License-Identifier: Apache-2.0
"""`SiteRow`: one site of one checkpoint in the fields of the paper; `CheckpointMaximum`: M, and where it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calib.errors import ArtifactError
from calib.protocols.paper_sites import MAXIMUM_KINDS, PaperSite

__all__ = ["FLOAT16_MAX", "CheckpointMaximum", "SiteRow"]

FLOAT16_MAX = 65504.0
"""Largest finite float16 number."""


@dataclass(frozen=True)
class SiteRow:
    """One site. Statistics are over all values; those that the authors do not compute for a kind are None.

    Attributes:
        checkpoint: name of the model.
        family: of the model; of a measured one its `model_type`.
        model_type: of its configuration.
        num_hidden_layers, hidden_size: of its main stack.
        site: which tensor.
        min, max: signed extremes.
        mean, std, rms, abs_mean: moments.
        abs_median, abs_q99, abs_q999: quantiles of abs(x).
        count: values, as a float: the published ones have six digits.
        massive_tokens: tokens that pass the test of Sun et al.
    """

    checkpoint: str
    family: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    site: PaperSite
    min: float
    max: float
    mean: float
    std: float
    rms: float
    abs_mean: float
    abs_median: float | None
    abs_q99: float | None
    abs_q999: float | None
    count: float
    massive_tokens: int | None

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.min), abs(self.max))


@dataclass(frozen=True)
class CheckpointMaximum:
    """M of one checkpoint: the largest magnitude over the five kinds of sites.

    Attributes:
        checkpoint, family, model_type, num_hidden_layers, hidden_size: as in `SiteRow`.
        value: M with its sign.
        site: published name of the site; of equal ones the first in a forward pass.
        crest: M / rms of that site.
        over_q999: M / 0.999 quantile of abs(x) of that site.
        by_kind: largest magnitude of each kind that the checkpoint has.
        massive_tokens: tokens that pass the test of Sun et al., summed over block outputs as published.
    """

    checkpoint: str
    family: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    value: float
    site: str
    crest: float | None
    over_q999: float | None
    by_kind: dict[str, float]
    massive_tokens: int | None

    @classmethod
    def of(cls, rows: Iterable[SiteRow]) -> CheckpointMaximum:
        """Of the rows of one checkpoint.

        Raises:
            ArtifactError: none of the five kinds is there, or an extreme is NaN or infinite.
        """
        held = sorted((r for r in rows if r.site.kind in MAXIMUM_KINDS), key=lambda r: r.site.forward_order)
        if not held:
            raise ArtifactError("max-activations: no row of the five kinds of sites; pass a file of such statistics")
        for row in held:
            if not (math.isfinite(row.min) and math.isfinite(row.max)):
                raise ArtifactError(f"{row.checkpoint}: {row.site.name} holds NaN or infinity; measure it again")
        top = max(held, key=lambda r: r.amax)
        by_kind: dict[str, float] = {}
        for row in held:
            by_kind[row.site.kind] = max(by_kind.get(row.site.kind, 0.0), row.amax)
        return cls(
            checkpoint=top.checkpoint,
            family=top.family,
            model_type=top.model_type,
            num_hidden_layers=top.num_hidden_layers,
            hidden_size=top.hidden_size,
            value=top.max if top.max >= -top.min else top.min,
            site=top.site.name,
            crest=top.amax / top.rms if top.rms > 0 else None,
            over_q999=top.amax / top.abs_q999 if top.abs_q999 else None,
            by_kind=by_kind,
            massive_tokens=_massive_tokens(held),
        )

    @property
    def magnitude(self) -> float:
        """M without its sign."""
        return abs(self.value)

    @property
    def overflows_float16(self) -> bool:
        """Whether M is beyond float16."""
        return self.magnitude > FLOAT16_MAX


def _massive_tokens(rows: Sequence[SiteRow]) -> int | None:
    counts = [row.massive_tokens for row in rows if row.site.kind == "hidden" and row.massive_tokens is not None]
    return sum(counts) if counts else None
