# SPDX-License-Identifier: Apache-2.0
"""What a check of an exported folder found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ConsumerReport", "Verification"]


@dataclass(frozen=True)
class ConsumerReport:
    """What a real consumer did with a folder.

    Attributes:
        consumer: name and version.
        scales_read: how many scales it holds after loading, equal to those of the file.
        scales: how many the file has.
        layers_exact: single layers whose output on random inputs is that of calib's quantized model, within the
            rounding of one float32 sum where `layer_difference` is not 0.
        layers: how many were compared.
        layer_difference: largest difference of a single layer, relative to its largest output.
        model_difference: largest difference of the whole model's output, relative to its largest value.
        allowance: what `model_difference` may be; a tie that rounds the other way changes later layers.
        integer_layers: layers that were multiplied in integers; None where this consumer emulates.
        saturating_layers: of those that are not exact, how many are equal but for sums of two products that this
            processor holds in 16 bits.
        speed: time of the float model divided by that of this one, median of alternating pairs; None if not taken.
    """

    consumer: str
    scales_read: int
    scales: int
    layers_exact: int
    layers: int
    layer_difference: float
    model_difference: float
    allowance: float
    integer_layers: int | None = None
    speed: float | None = None
    saturating_layers: int = 0

    @property
    def problems(self) -> list[str]:
        """What is wrong, one line each."""
        found = []
        if self.scales_read < self.scales:
            found.append(
                f"{self.consumer}: {self.scales - self.scales_read} of {self.scales} scales were not read as written"
            )
        other = self.layers - self.layers_exact - self.saturating_layers
        if other:
            found.append(
                f"{self.consumer}: {other} of {self.layers} layers compute something else, "
                f"by up to {self.layer_difference:.3g} of their largest output"
            )
        if self.saturating_layers:
            found.append(
                f"{self.consumer}: {self.saturating_layers} of {self.layers} layers saturate on this processor, which "
                f"adds products in 16 bits, and differ by up to {self.layer_difference:.3g} of their largest output; "
                "one with VNNI computes them exactly"
            )
        if not self.model_difference <= self.allowance:
            found.append(
                f"{self.consumer}: outputs differ by {self.model_difference:.3g} of the largest one, "
                f"more than {self.allowance:g}"
            )
        return found


@dataclass
class Verification:
    """What was found in a folder.

    Attributes:
        format: of the folder.
        scales_read: scales that are there and valid.
        scales: scales that should be there.
        problems: one line each, naming the tensor.
        not_checked: what could not be looked at, and why.
        consumer: what the real consumer did, if it was run.
    """

    format: str
    scales_read: int = 0
    scales: int = 0
    problems: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    consumer: ConsumerReport | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}
