# SPDX-License-Identifier: Apache-2.0
"""`scales.json`: for each tensor the observed range, the grid, and the error to expect.

The file holds the *range* and the *grid*. Consumers differ in the formula that makes a scale of a range
(amax/127, amax/127.5, amax/448 ...), so an exporter derives its own scale from `min`, `max` and the grid.
A number in this file is never NaN, infinite, zero where a divisor is meant, or invented.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from calib.schema.provenance import CorpusProvenance, ModelProvenance, Producer, Strict

__all__ = [
    "FORMAT",
    "VERSION",
    "CureRecord",
    "ExpectedError",
    "HeadScales",
    "ScaleFile",
    "Scheme",
    "TensorScale",
    "Verdict",
]

FORMAT = "calib.scales"
VERSION = "1.0"

Granularity = Literal["per-tensor", "per-channel", "per-row", "per-token", "per-group", "per-head"]
Verdict = Literal["static", "dynamic-per-token", "float"]


class Scheme(Strict):
    """How a tensor is put on a grid."""

    bits: int = Field(ge=2, le=16)
    symmetric: bool
    granularity: Granularity
    dynamic: bool = False
    dtype: Literal["int", "float"] = "int"


class ExpectedError(Strict):
    """Reconstruction error of one tensor, computed from its histogram. `None`: not computable offline."""

    sqnr_db: float | None = Field(
        description="10 log10(sum x^2 / sum (x - Q(x))^2), all values; None if the error is 0"
    )
    body_sqnr_db: float | None = Field(description="The same over the body: |x| <= 0.999 quantile (body v1)")
    peak_sqnr_db: float | None = Field(default=None, description="The same over the peak: |x| above that quantile")
    rel_mae: float | None = Field(description="sum |x - Q(x)| / sum |x|")
    clipped: float | None = Field(ge=0, le=1, description="Share of values outside the range that the grid covers")
    zeroed: float | None = Field(ge=0, le=1, description="Share of all values that are not 0 but become 0")
    estimated: bool = Field(default=False, description="True where a noise model stands in for the histogram")


class HeadScales(Strict):
    """One range and one grid per head of keys or values, in the order of the heads that attention gets.

    They always span what the head held; the entry's own scale, one for all heads, is what the method chose.
    """

    min: list[float] = Field(description="Smallest value of each head")
    max: list[float] = Field(description="Largest value of each head")
    scale: list[float] = Field(description="Step of each head's grid; the levels are those of the entry")
    zero_point: list[int] = Field(description="Level that stands for 0 in each head")

    @model_validator(mode="after")
    def _one_of_each(self) -> HeadScales:
        lengths = {len(self.min), len(self.max), len(self.scale), len(self.zero_point)}
        if len(lengths) > 1 or not self.scale:
            raise ValueError(f"lists of {sorted(lengths)} entries; each must have one per head")
        if not all(math.isfinite(low) and math.isfinite(high) for low, high in zip(self.min, self.max, strict=True)):
            raise ValueError("the range of a head is not finite")
        for scale in self.scale:
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"scale {scale} of a head is not a positive finite number")
        return self


class TensorScale(Strict):
    """One tensor. `scale` and `zero_point` are lists for per-channel and per-row schemes."""

    kind: str
    module: str
    port: str = Field(description="input, output, query, key, value, hidden, weight ...")
    scheme: Scheme
    min: float = Field(description="Smallest value observed")
    max: float = Field(description="Largest value observed")
    amax: float = Field(ge=0, description="max(|min|, |max|) observed")
    range_min: float = Field(description="Lower end of the range that the method chose (= min for absmax, asymmetric)")
    range_max: float = Field(description="Upper end of the range that the method chose")
    scale: float | list[float] | None = Field(description="Step of the grid in units of the tensor; None if dynamic")
    zero_point: int | list[int] = 0
    heads: HeadScales | None = Field(default=None, description="Of keys, values and queries, where heads were seen")
    qmin: int
    qmax: int
    formula: str = Field(description="How scale follows from the range, e.g. 'max(|range|)/127'")
    method: str
    shared_with: list[str] = Field(default_factory=list, description="Names that read this same tensor")
    expected: ExpectedError
    verdict: Verdict
    reason: str = Field(description="Why this verdict, in words")

    @model_validator(mode="after")
    def _numbers_are_usable(self) -> TensorScale:
        scales = [] if self.scale is None else self.scale if isinstance(self.scale, list) else [self.scale]
        for scale in scales:
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"scale {scale} is not a positive finite number")
        if self.scale is None and not self.scheme.dynamic:
            raise ValueError("a static tensor needs a scale")
        for name in ("min", "max", "amax", "range_min", "range_max"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is not finite")
        points = self.zero_point if isinstance(self.zero_point, list) else [self.zero_point]
        if any(not self.qmin <= point <= self.qmax for point in points):
            raise ValueError(f"zero_point outside {self.qmin}..{self.qmax}")
        return self


Setting = (
    bool
    | int
    | float
    | str
    | list[int]
    | list[float]
    | list[str]
    | dict[str, float]
    | dict[str, str]
    | dict[str, dict[str, float]]
)


class CureRecord(Strict):
    """One change that was made to the model before its scales were chosen, in the order of application."""

    kind: Literal["smooth", "prefix", "rotate", "scale", "keep", "clip", "compensate"]
    summary: str = Field(description="What was done and why, in one line")
    needs: Literal["nothing", "prefix", "online-op"] = Field(
        default="nothing",
        description="What a consumer must do beyond loading the cured weights: put tokens (or their cached keys and "
        "values, in float) in front of every sequence; or compute an operation that ordinary checkpoints do not hold",
    )
    settings: dict[str, Setting] = Field(default_factory=dict, description="What reproduces it, e.g. token_ids, alphas")

    @property
    def name(self) -> str:
        """As `calib quantize --cure` takes it: a rotation that is computed as the model runs is another cure."""
        return f"{self.kind}-online" if self.kind == "rotate" and self.needs == "online-op" else self.kind


class ScaleFile(Strict):
    """The whole of `scales.json`."""

    format: Literal["calib.scales"] = "calib.scales"
    version: str = VERSION
    producer: Producer
    model: ModelProvenance
    corpus: CorpusProvenance
    measurement_sha256: str = Field(description="Content hash of the measurement these scales were chosen from")
    method: str
    bits: int = Field(ge=2, le=16)
    tensors: dict[str, TensorScale]
    cures: list[CureRecord] = Field(default_factory=list)
    coverage: dict[str, int] = Field(description="Tensors per site kind")
    gates: dict[str, bool] = Field(default_factory=dict)
    ignore: list[str] = Field(default_factory=list, description="Modules left in floating point, each on purpose")
    left_out: dict[str, str] = Field(default_factory=dict, description="Measured tensor without a scale -> the reason")
    aliases: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="Graph (onnx, gguf) -> name here -> name there; written by an export"
    )
    verdict: Verdict
    reason: str
