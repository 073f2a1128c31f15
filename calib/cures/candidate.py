# SPDX-License-Identifier: Apache-2.0
"""`Candidate`: a set of cures, and how the model computes with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from calib.corpus import TokenBlocks
from calib.cures.clip import Clip
from calib.cures.offline import OfflineRotation
from calib.cures.pairs import Pair, Pairs
from calib.cures.prefix import Prefix
from calib.cures.ranges import scaled_ranges
from calib.cures.record import smoothing_record
from calib.cures.rotate import OnlineRotation
from calib.cures.scale import OnlineScaling
from calib.cures.smooth import Smoothing
from calib.measurement.artifact import Measurement
from calib.quantized import QuantizationPlan, QuantizedModel, plan_from_scales
from calib.quantized.grid import Convention, IntegerGrid
from calib.quantized.rounded_file import rounded_sha256
from calib.quantized.weights import WeightScheme
from calib.scales import choose_scales
from calib.schema.scales import CureRecord, ScaleFile

__all__ = ["CONVENTION", "KEPT", "Candidate", "RowsOrTensor", "role_of"]

RowsOrTensor = Literal["per-row", "per-tensor"]
CONVENTION: Convention = "compressed-tensors"
"""The grids of the checkpoint that is written: what is judged is what will run."""
KEPT = "kept in float for its effect on the output"


@dataclass(frozen=True, eq=False)
class Candidate:
    """Cures, in the order in which they act; nothing is applied yet.

    Attributes:
        bits: of activations and weights.
        symmetric: grid of activations.
        measurement: of the model behind the prefix, rotated, but not smoothed: what smoothing is computed from.
        ranges: of the model with these cures: what scales are chosen from.
        weight_granularity: one weight scale per output row, or one for all.
        prefix: tokens in front of every sequence.
        resampled: blocks that `measurement` and `ranges` cover beside the given ones.
        rotation: folded into weights.
        smoothing: folded into weights.
        input_rotation: computed online.
        scaling: computed online.
        plan: the quantized model; made of `ranges` if absent.
        kept: layers in float.
        compensated: whether the weights of `plan` are rounded with error compensation.
        clip: tensors whose grid does not reach as far as `ranges`.
    """

    bits: int
    symmetric: bool
    measurement: Measurement
    ranges: Measurement
    weight_granularity: RowsOrTensor = "per-row"
    prefix: Prefix | None = None
    resampled: TokenBlocks | None = None
    rotation: OfflineRotation | None = None
    smoothing: Smoothing | None = None
    input_rotation: OnlineRotation | None = None
    scaling: OnlineScaling | None = None
    plan: QuantizationPlan | None = None
    kept: tuple[str, ...] = ()
    compensated: bool = False
    clip: Clip | None = None

    @property
    def name(self) -> str:
        """The cures, for people."""
        parts = []
        if self.prefix is not None:
            parts.append(f"prefix {self.prefix.text!r}")
        if self.resampled is not None:
            parts.append("resample")
        if self.rotation is not None:
            parts.append("rotate")
        if self.smoothing is not None:
            alphas = dict(zip(map(role_of, self.smoothing.pairs), self.smoothing.alphas, strict=True))
            each = [f"{role} {alpha:g}" for role, alpha in alphas.items()]
            parts.append(
                "smooth " + (f"{self.smoothing.alphas[0]:g}" if len(set(alphas.values())) == 1 else ", ".join(each))
            )
        if self.input_rotation is not None:
            parts.append("rotate-online")
        if self.scaling is not None:
            parts.append("scale")
        if self.compensated:
            parts.append("compensate")
        if self.kept:
            parts.append(f"keep {', '.join(self.kept)}")
        if self.clip is not None:
            parts.append("clip")
        return " + ".join(parts) or "none"

    @property
    def alpha(self) -> float | None:
        """Of the first pair; that of all where one was chosen for all. None without smoothing."""
        return None if self.smoothing is None else self.smoothing.alphas[0]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Token ids in front of every sequence."""
        return () if self.prefix is None else self.prefix.token_ids

    @property
    def changes_model(self) -> bool:
        """Whether the float model is another one: other weights, operations or first tokens."""
        return self.prefix is not None or bool(self._changes)

    @property
    def _changes(self) -> list[OfflineRotation | Smoothing | OnlineRotation | OnlineScaling]:
        """In the order in which they act."""
        cures = (self.rotation, self.smoothing, self.input_rotation, self.scaling)
        return [cure for cure in cures if cure is not None]

    @property
    def convention(self) -> Convention:
        """The grids of what will run: of a checkpoint, or of the graph where that alone can hold the cures."""
        return CONVENTION if self.scaling is None else "calib"

    def apply(self, model: nn.Module, *, rotated: bool = False) -> ExitStack:
        """Changes the model: still float, the same function. Closing the result changes it back.

        Args:
            model: the original one.
            rotated: whether `rotation` is in its weights already.
        """
        with ExitStack() as stack:
            for cure in self._changes:
                if not (rotated and cure is self.rotation):
                    stack.enter_context(cure.apply(model))
            return stack.pop_all()

    def scaled(self, model: nn.Module, pairs: Pairs) -> Candidate | None:
        """The same with loud channels brought down in front of layers that no pair ends in and nothing rotates."""
        reached = {consumer.module for pair in pairs for consumer in pair.consumers}
        reached |= set() if self.input_rotation is None else set(self.input_rotation.modules)
        modules = {name.partition("#")[0] for name in self.planned(model).inputs} - reached
        scaling = OnlineScaling.find(model, self.ranges, modules, include_sink=self.prefix is None)
        if not scaling.factors:
            return None
        return replace(self, scaling=scaling, ranges=scaled_ranges(self.ranges, scaling))

    @contextmanager
    def quantized(
        self, model: nn.Module, *, rotated: bool = False, mode: Literal["fake", "int8"] = "fake"
    ) -> Iterator[QuantizedModel]:
        """The model computes as the quantized one with these cures; see `apply` and `QuantizedModel`."""
        with self.apply(model, rotated=rotated), QuantizedModel(model, self.planned(model), mode=mode) as quantized:
            yield quantized

    def planned(self, model: nn.Module) -> QuantizationPlan:
        """The plan of the quantized model: weights are rounded as they are when it runs."""
        if self.plan is not None:
            return self.plan
        plan = plan_from_scales(
            model,
            self.scales(),
            weights=WeightScheme(IntegerGrid.of(self.bits, convention=self.convention), self.weight_granularity),
            convention=self.convention,
            skip_positions=len(self.prefix_ids),
        )
        return plan.without(dict.fromkeys(self.kept, KEPT)) if self.kept else plan

    def with_ranges(self, model: nn.Module, ranges: Measurement, clip: Clip | None = None) -> Candidate:
        """The same, inputs rounded by other ranges. Weights that were rounded already stay as they are.

        Args:
            model: with these cures.
            ranges: of it.
            clip: tensors whose grid does not reach as far.
        """
        changed = replace(self, ranges=ranges, clip=clip, plan=None)
        plan = changed.planned(model)
        if self.plan is not None:
            plan = plan.with_weights({name: w for name, w in self.plan.weights.items() if name in plan.weights})
        return replace(changed, plan=plan)

    def scales(self) -> ScaleFile:
        """Scales by the ranges, without a word of the cures."""
        return choose_scales(
            self.ranges,
            bits=self.bits,
            symmetric=self.symmetric,
            weight_granularity=self.weight_granularity,
            include_sink=self.prefix is None,
            limits=None if self.clip is None else self.clip.limits,
        )

    def records(self) -> list[CureRecord]:
        """Entries of `cures` in scales.json."""
        found = [] if self.prefix is None else [self.prefix.record()]
        if self.rotation is not None:
            found.append(self.rotation.record())
        if self.smoothing is not None:
            found.append(smoothing_record(self.smoothing))
        if self.input_rotation is not None:
            found.append(self.input_rotation.record())
        if self.scaling is not None:
            found.append(self.scaling.record())
        if self.compensated:
            summary = "weights rounded with error compensation (GPTQ), channels in the order of their energy"
            rounded = {} if self.plan is None else self.plan.rounded
            digests = {name: rounded_sha256(weight.codes, weight.scale) for name, weight in rounded.items()}
            found.append(
                CureRecord(
                    kind="compensate", summary=summary, settings={"order": "activation", "rounded_sha256": digests}
                )
            )
        if self.kept:
            summary = f"{len(self.kept)} layers left in float, by their measured effect on the output"
            found.append(CureRecord(kind="keep", summary=summary, settings={"modules": list(self.kept)}))
        if self.clip is not None:
            found.append(self.clip.record())
        return found


def role_of(pair: Pair) -> str:
    """What a pair does in its block: the name of its first consumer, without that of the block."""
    return re.sub(r"(?:^|.*\.)\d+\.", "", pair.consumers[0].module)
