# SPDX-License-Identifier: Apache-2.0
"""What a search for cures may do, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from calib.cures.candidate import Candidate, RowsOrTensor
from calib.errors import UsageError
from calib.evaluation.interval import Interval
from calib.measurement.artifact import Measurement
from calib.models import OpenedModel
from calib.quantized import QuantizationPlan
from calib.scales import Grid
from calib.schema.scales import ScaleFile

__all__ = ["AUTO", "AUTO_DECODER", "CURES", "CureOptions", "Cured", "Row"]

CURES: dict[str, str] = {
    "smooth": "per-channel migration into the weights before and behind a tensor; an ordinary checkpoint",
    "prefix": "tokens in front of every sequence that take the attention sink; the consumer must put them there",
    "resample": "ranges that also cover words which the model itself expects in the text; an ordinary checkpoint",
    "compensate": "weights rounded with error compensation (GPTQ); an ordinary checkpoint",
    "rotate": "the residual stream and values in another basis, in the weights; an ordinary checkpoint",
    "rotate-online": "a rotation computed in front of layers behind a product; a checkpoint says so, vLLM computes it",
    "scale": "loud channels brought down in front of layers that smoothing cannot reach; a graph can hold that",
    "keep": "the fewest layers left in float, by measured effect; an ignore list",
}
AUTO = ("smooth", "prefix", "rotate", "compensate")
AUTO_DECODER = (*AUTO, "rotate-online")
"""What `auto` stands for: of models that predict tokens there is a server (vLLM) that computes a rotation."""


@dataclass(frozen=True)
class CureOptions:
    """What the search may do.

    Attributes:
        cures: allowed ones, of `CURES`; ``auto`` stands for `AUTO` or `AUTO_DECODER`.
        target: largest ratio of perplexity to the float model (1 + relative error where nothing is predicted).
        bits: of activations and weights.
        symmetric: grid of activations.
        weight_granularity: one weight scale per output row, or one for all.
        keep: most layers left in float.
        batch_size: blocks of a forward pass.
    """

    cures: tuple[str, ...] = ("auto",)
    target: float = 1.01
    bits: int = 8
    symmetric: bool = True
    weight_granularity: RowsOrTensor = "per-row"
    keep: int = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in self.cures:
            if name not in CURES and name != "auto":
                raise UsageError(f"--cure {name}: unknown; choose auto, none, or of {', '.join(CURES)}")
        if self.keep < 0:
            raise UsageError(f"--keep {self.keep}: no number of layers; pass 0 or more")
        Grid(self.bits, self.symmetric)  # refuses bits that no grid has
        if self.target < 1:
            raise UsageError(f"--target {self.target}: a ratio to the float model, 1 or more; 1.01 is 1 % worse")


@dataclass(frozen=True)
class Row:
    """One line of the ablation table.

    Attributes:
        candidate: the cures.
        divergence: on verification blocks, see `Judge`.
        ratio: of perplexity to the float model with the same tokens in context; None if nothing is predicted.
        seconds: that finding it took.
    """

    candidate: Candidate
    divergence: Interval
    ratio: Interval | None
    seconds: float

    @property
    def name(self) -> str:
        """The cures, for people."""
        return self.candidate.name


@dataclass(eq=False)
class Cured:
    """What was found. The model carries the cures in its weights.

    Attributes:
        opened: the model, with a provenance of its own where weights were changed.
        scales: of the cured model.
        measurement: of the cured model, behind its prefix.
        plan: of the quantized model, as an export has it.
        rows: the ablation in the order of the search; the last is the model as it is written, its ranges taken from all
            blocks.
        reason: what was chosen, and whether it meets the target.
        skipped: cures that do not apply -> the reason.
    """

    opened: OpenedModel
    scales: ScaleFile
    measurement: Measurement
    plan: QuantizationPlan
    rows: list[Row]
    reason: str
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def candidate(self) -> Candidate:
        """The cures that were chosen."""
        return self.rows[-1].candidate
