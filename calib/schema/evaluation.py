# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: the float model and its quantized forms on the same blocks, and errors of tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from calib.schema.provenance import CorpusProvenance, ModelProvenance, Producer, Strict

__all__ = ["FORMAT", "VERSION", "EvaluationFile", "EvaluationRow", "IntervalRecord", "LayerTable", "TensorRow"]

FORMAT = "calib.evaluation"
VERSION = "1.0"


class IntervalRecord(Strict):
    """A mean over blocks with its 90 % interval: paired bootstrap, 10,000 draws of blocks, seed 0."""

    value: float
    low: float
    high: float


class EvaluationRow(Strict):
    """One form of the model. Figures that do not apply to the model, or to the float row, are None."""

    label: str
    inputs: Literal["float", "none", "dynamic-per-token", "static"]
    kv_cache: Literal["none", "dynamic-per-token", "static"] = "none"
    prefix: list[int] = Field(default_factory=list, description="Token ids in front of each block, left in float")
    perplexity: float | None = Field(default=None, description="Over all tokens of a block but its first")
    ratio: IntervalRecord | None = Field(default=None, description="Perplexity over that of float, the same prefix")
    kl: IntervalRecord | None = Field(default=None, description="KL(float || quantized) per token, in nats")
    top1: IntervalRecord | None = Field(default=None, description="Share with the same token or class on top as float")
    cosine: IntervalRecord | None = Field(default=None, description="Cosine to the float embedding: mean over tokens")
    sqnr_db: float | None = Field(default=None, description="Of logits or embeddings; None for language models")
    silent: list[str] = Field(default_factory=list, description="Planned modules that no pass reached")


class TensorRow(Strict):
    """Errors of one tensor, SQNR in dB; None where nothing differs or it is not known."""

    name: str
    running_sqnr_db: float | None = Field(description="Inside of the quantized model against the float model")
    running_rel_mae: float | None = Field(description="sum |x - y| / sum |x| of the same")
    isolated_sqnr_db: float | None = Field(description="Its rounding alone, of the float tensor")
    isolated_rel_mae: float | None
    isolated_zeroed: float | None = Field(description="Share of values that are not 0 but become 0")
    expected_sqnr_db: float | None = Field(description="What the scale file says of the calibration data")
    difference_db: float | None = Field(description="isolated - expected")


class LayerTable(Strict):
    """Errors of tensors in one form of the model."""

    label: str = Field(description="Row that this is about")
    blocks: int
    median_difference_db: float | None = Field(description="Median over tensors of |isolated - expected|")
    limit_db: float
    beyond_limit: list[str] = Field(description="Tensors that differ by more than the limit, furthest first")
    worst: list[str] = Field(description="Tensors with the lowest running SQNR")
    tensors: list[TensorRow]


class EvaluationFile(Strict):
    """The whole of an evaluation."""

    format: Literal["calib.evaluation"] = "calib.evaluation"
    version: str = VERSION
    producer: Producer
    model: ModelProvenance
    corpus: CorpusProvenance
    measurement_sha256: str | None = Field(description="Of the measurement that the scales were chosen from")
    bits: int
    rows: list[EvaluationRow]
    left_out: dict[str, str] = Field(description="What stays in float in the last row -> the reason")
    layers: LayerTable | None
    notes: list[str] = Field(default_factory=list)
