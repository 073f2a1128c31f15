# SPDX-License-Identifier: Apache-2.0
"""`measurement.json`: what was measured, readable; the arrays are in `measurement.safetensors` beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from calib.schema.provenance import CorpusProvenance, ModelProvenance, Producer, RunProvenance, Strict

__all__ = [
    "FORMAT",
    "VERSION",
    "GateRecord",
    "MeasurementFile",
    "ModalityRecord",
    "PeakRecord",
    "SiteRecord",
    "WeightRecord",
]

FORMAT = "calib.measurement"
VERSION = "1.1"


class PeakRecord(Strict):
    """One of the largest values of a site; the full list is in the arrays."""

    value: float
    document: int = Field(description="-1 if unknown")
    position: int
    channel: int
    token_id: int = Field(description="-1 if there is no token; texts are never stored")


class ModalityRecord(Strict):
    """The tokens of one modality at one site; the statistics in full are in the arrays."""

    count: int = Field(description="Finite values")
    amax: float
    sink_amax: float
    body_amax: float


class SiteRecord(Strict):
    """One tensor position. Numbers are over all values unless they say `body` or `sink`."""

    kind: str
    module: str
    port: str
    layer: int | None
    dtype: str
    channels: int
    count: int = Field(description="Finite values")
    nonfinite: int
    first_nonfinite: tuple[int, int, int] | None = Field(description="(document, position, channel)")
    min: float | None
    max: float | None
    amax: float
    rms: float | None
    sink_amax: float = Field(description="Largest magnitude at sink positions, the first tokens of a block")
    body_amax: float = Field(description="Largest magnitude at all other positions")
    quantiles_abs: dict[str, float] = Field(description="Quantile of abs(x) -> value; empty with ranges only")
    aliases: dict[str, str] = Field(
        description="Names of the same tensor -> kind there; its own only if that is another"
    )
    peaks: list[PeakRecord]
    order: list[int] = Field(default=[], description="Place in the model: module, port, call, expert")
    heads: int | None = Field(default=None, description="Heads of a query, key or value; its channels are [heads, dim]")
    expert: int | None = None
    forced: bool = Field(default=False, description="No token was routed to this expert; tokens were sent to it")
    modalities: dict[str, ModalityRecord] = Field(
        default={}, description="text, image, video, audio apart, where the model has several"
    )


class WeightRecord(Strict):
    """One parameter."""

    module: str
    layer: int | None
    dtype: str
    shape: list[int]
    amax: float
    rms: float
    tied: list[str]


class GateRecord(Strict):
    """A condition that must hold before scales are written."""

    name: str
    passed: bool
    detail: str
    names: list[str] = Field(default=[], description="All that it failed for; `detail` shows some")


class MeasurementFile(Strict):
    """The whole of `measurement.json`."""

    format: Literal["calib.measurement"] = "calib.measurement"
    version: str = VERSION
    producer: Producer
    model: ModelProvenance
    corpus: CorpusProvenance
    run: RunProvenance
    gates: list[GateRecord]
    coverage: dict[str, int] = Field(description="Names per kind, each under its own kind")
    statistics: Literal["full", "ranges"]
    arrays_sha256: str = Field(description="sha256 of measurement.safetensors")
    sites: dict[str, SiteRecord]
    weights: dict[str, WeightRecord]
