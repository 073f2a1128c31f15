# SPDX-License-Identifier: Apache-2.0
"""`nn.Linear` and transformers' transposed `Conv1D` seen alike: output rows, input columns."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["columns_of", "is_linear", "matrix_of", "rows_of"]


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


def _transposed(module: nn.Module) -> bool:
    # transformers' class, whose `nf` is its number of outputs; torch's convolutions are named Conv1d
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
