# SPDX-License-Identifier: Apache-2.0
"""How a module's parameters must change so that its output, or its input, is scaled per channel."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from calib.cures.linear import is_linear, matrix_of
from calib.cures.relation import same
from calib.cures.scope import Call

__all__ = ["RULES", "Rule", "consumer_scales", "producer_rule"]

Rule = Literal["norm", "norm_plus_one", "linear"]
RULES: dict[Rule, str] = {
    "norm": "weight and bias times the scale of their channel",
    "norm_plus_one": "the norm multiplies by 1 + weight (gemma): (1 + weight) times the scale, minus 1",
    "linear": "rows of the weight, and the bias, times the scale of their channel",
}


def producer_rule(module: nn.Module, call: Call, scales: torch.Tensor) -> Rule | None:
    """The rule by which `module` returns its output times `scales`; None if no rule does.

    Args:
        module: a norm or a linear layer.
        call: arguments to try it with.
        scales: float32 ``[channels]``.
    """
    rules: tuple[Rule, ...] = ("linear",) if is_linear(module) else ("norm", "norm_plus_one")
    plain = _returned(module, {}, call)
    if plain is None:
        return None
    for rule in rules:
        changed = {
            name: scaled(module, name, p.detach(), scales, rule)
            for name, p in module._parameters.items()
            if p is not None
        }
        result = _returned(module, changed, call)
        if result is not None and same([plain * scales], [result]):
            return rule
    return None


def scaled(module: nn.Module, name: str, value: torch.Tensor, scales: torch.Tensor, rule: Rule) -> torch.Tensor:
    """A producer's parameter, float32, for an output times `scales`."""
    if name not in {"weight", "bias"}:
        return value
    if rule == "linear" and name == "weight":
        return matrix_of(module, matrix_of(module, value) * scales[:, None])
    if rule == "norm_plus_one" and name == "weight":
        return (1 + value) * scales - 1
    return value * scales


def consumer_scales(module: nn.Module, call: Call, scales: torch.Tensor) -> bool:
    """Whether columns of `module` times `scales` make up for an input divided by them."""
    args, kwargs = call
    if not args:
        return False
    weight = module.get_parameter("weight").detach()
    changed = matrix_of(module, matrix_of(module, weight) * scales)
    plain = _returned(module, {}, call)
    result = _returned(module, {"weight": changed}, ((args[0] / scales, *args[1:]), kwargs))
    return plain is not None and result is not None and same([plain], [result])


def _returned(module: nn.Module, parameters: dict[str, torch.Tensor], call: Call) -> torch.Tensor | None:
    with torch.no_grad():
        result: Any = functional_call(module, parameters, *call)
    return result if isinstance(result, torch.Tensor) else None
