# SPDX-License-Identifier: Apache-2.0
"""`QuantizationPlan`: which tensors of a model are put on which grid, and which are not, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from calib.errors import UsageError
from calib.quantized.quantizers import TensorQuantizer
from calib.quantized.weights import QuantizedWeight, WeightScheme

__all__ = ["QuantizationPlan"]


@dataclass(frozen=True)
class QuantizationPlan:
    """What `QuantizedModel` does to a model. Names are fully qualified module names.

    A module that is called several times in one forward pass (shared layers) may have a quantizer for each call, named
    ``module#0``, ``module#1`` ...; without a number, one serves all calls.

    Attributes:
        inputs: first argument of a module.
        weights: how to round a weight, or the rounded weight itself (after GPTQ).
        outputs: what a module returns, where that is one tensor.
        attention: attention module -> ``query``, ``key`` or ``value`` as attention gets them, after rotary embedding.
            Keys and values of earlier tokens come out of the cache in float and are rounded again in each call.
        skip_positions: the first n tokens of a row are computed in float: inputs, outputs, queries, keys and values of
            layout ``[rows, tokens, channels]``, ``[rows * tokens, channels]`` or ``[rows, heads, tokens, dim]``, and
            products of linear layers, as if their keys and values had been computed by the float model and cached.
            Counted from the first token that is in the cache, so that later steps of a generation skip nothing more.
            Other layouts are rounded everywhere.
        left_out: what stays in float -> the reason.
    """

    inputs: Mapping[str, TensorQuantizer] = field(default_factory=dict)
    weights: Mapping[str, WeightScheme | QuantizedWeight] = field(default_factory=dict)
    outputs: Mapping[str, TensorQuantizer] = field(default_factory=dict)
    attention: Mapping[str, Mapping[str, TensorQuantizer]] = field(default_factory=dict)
    skip_positions: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.skip_positions < 0:
            raise UsageError(f"skip positions {self.skip_positions}: must be 0 or more")
        for name, parts in self.attention.items():
            for part in parts:
                if part not in ("query", "key", "value"):
                    raise UsageError(f"{name}:{part}: no part of attention; choose query, key or value")

    @property
    def rounded(self) -> dict[str, QuantizedWeight]:
        """Weights whose codes are fixed already."""
        return {name: weight for name, weight in self.weights.items() if isinstance(weight, QuantizedWeight)}

    def without(self, modules: Mapping[str, str]) -> Self:
        """The plan with some modules wholly left in float.

        Args:
            modules: name -> the reason.

        Raises:
            UsageError: the plan has nothing of this name.
        """
        names = {name.partition("#")[0] for name in [*self.inputs, *self.outputs]} | {*self.weights, *self.attention}
        for name in modules:
            if name not in names:
                raise UsageError(f"{name}: not in the plan; name a module that it quantizes")
        return dataclasses.replace(
            self,
            inputs={n: q for n, q in self.inputs.items() if n.partition("#")[0] not in modules},
            weights={n: w for n, w in self.weights.items() if n not in modules},
            outputs={n: q for n, q in self.outputs.items() if n.partition("#")[0] not in modules},
            attention={n: q for n, q in self.attention.items() if n not in modules},
            left_out={**self.left_out, **modules},
        )

    def with_weights(self, weights: Mapping[str, WeightScheme | QuantizedWeight]) -> Self:
        """The plan with other weights in the place of its own, for instance after error compensation."""
        return dataclasses.replace(self, weights={**self.weights, **weights})
