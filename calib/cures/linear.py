# SPDX-License-Identifier: Apache-2.0
"""`nn.Linear` and transformers' transposed `Conv1D` seen alike: output rows, input columns."""

from __future__ import annotations

import torch
from torch import nn

from calib.errors import ModelError, UsageError

__all__ = ["columns_of", "is_linear", "matrix_of", "other_holder", "own_matrix", "rows_of"]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product with a weight of its own; subclasses count (FalconLinear)."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False
    return isinstance(module, nn.Linear) or _transposed(module)


def matrix_of(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight of `module` as ``[outputs, inputs]``, a view."""
    return weight.T if _transposed(module) else weight


def rows_of(module: nn.Module) -> int:
    """Number of output channels of a linear layer."""
    return matrix_of(module, module.get_parameter("weight")).shape[0]


def columns_of(module: nn.Module) -> int:
    """Number of input channels of a linear layer."""
    return matrix_of(module, module.get_parameter("weight")).shape[1]


def own_matrix(model: nn.Module, name: str) -> torch.Tensor:
    """The weight of a linear layer as ``[outputs, inputs]``, a view, where it can be changed for this layer alone.

    Raises:
        UsageError: the name is of no linear layer.
        ModelError: the weight is shared with another module, or not in memory.
    """
    module = dict(model.named_modules()).get(name)
    if module is None or not is_linear(module):
        kind = "no module" if module is None else f"a {type(module).__name__}, no linear layer,"
        raise UsageError(f"{name}: is {kind} of {type(model).__name__}; name linear layers")
    weight = module.get_parameter("weight")
    if weight.is_meta:
        raise ModelError(f"{name}: its weight is not in memory; load the model without offloading")
    other = other_holder(model, module)
    if other is not None:
        raise ModelError(f"{name}: its weight is tied to {other}, which reads another input; leave this layer out")
    return matrix_of(module, weight.detach())


def other_holder(model: nn.Module, module: nn.Module) -> str | None:
    """Name of another module that holds the weight of this one."""
    weight = module.get_parameter("weight")
    others = (
        n for n, m in model.named_modules() if m is not module and any(p is weight for p in m._parameters.values())
    )
    return next(others, None)


def _transposed(module: nn.Module) -> bool:
    # transformers' class, whose `nf` is its number of outputs; torch's convolutions are named Conv1d
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
