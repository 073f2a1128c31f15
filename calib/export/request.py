# SPDX-License-Identifier: Apache-2.0
"""`ExportRequest`: what an exporter works from; `ExportSummary`: what it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import UsageError
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.models import OpenedModel
    from calib.quantized import QuantizedWeight

__all__ = ["ExportRequest", "ExportSummary"]


@dataclass(frozen=True)
class ExportRequest:
    """What is to be written, where.

    Attributes:
        scales: the scale file.
        folder: exists and is empty.
        model: the model that was measured, if it is at hand.
        measurement: what the scales were chosen from, if it is at hand.
        variant: of the format.
        kv_cache: write scales of keys and values too.
        kv_heads: one of them per head instead of one per tensor.
        shard_size: of checkpoint files, as huggingface_hub reads it.
        weights: rounded before, with error compensation; all others are rounded to nearest.
    """

    scales: ScaleFile
    folder: Path
    model: OpenedModel | None = None
    measurement: Measurement | None = None
    variant: str = ""
    kv_cache: bool = False
    kv_heads: bool = False
    shard_size: str = "5GB"
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @property
    def opened(self) -> OpenedModel:
        """The model.

        Raises:
            UsageError: it was not given.
        """
        if self.model is None:
            raise UsageError("export: this format holds weights or names of a graph; pass the model with --model")
        return self.model

    @property
    def measured(self) -> Measurement:
        """The measurement.

        Raises:
            UsageError: it was not given.
        """
        if self.measurement is None:
            raise UsageError(
                "export: this format holds statistics of channels, which scales.json lacks; "
                "pass the measurement with --measurement"
            )
        return self.measurement


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    Attributes:
        quantized: modules (or tensors) with a scale.
        in_float: modules without one -> the reason.
        kv_cache: attention modules with scales of keys and values.
        notes: what a user should know: scales that were unified, kernels that some hardware lacks.
        aliases: graph (`onnx`, `gguf`) -> our name -> its name there.
    """

    quantized: list[str]
    in_float: dict[str, str] = field(default_factory=dict)
    kv_cache: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
