# SPDX-License-Identifier: Apache-2.0
"""The weights that a deployment quantizes, each as a matrix of outputs by inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from calib.sites.structure import Structure, is_projection

__all__ = ["Weight", "find_weights"]


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter. `tied` are other modules that hold the very same one."""

    module: str
    layer: int | None
    parameter: torch.Tensor
    matrix: torch.Tensor  # [outputs, inputs], a view
    tied: tuple[str, ...]

    @property
    def name(self) -> str:
        """``fqn:weight``."""
        return f"{self.module}:weight"


def find_weights(model: nn.Module) -> Iterator[Weight]:
    """Weights of all projections and embeddings, in module order, a tied one once under its first name."""
    structure = Structure.of(model)
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and (is_projection(module) or isinstance(module, nn.Embedding)):
            holders.setdefault(id(weight), []).append((name, module))
    for (name, module), *others in holders.values():
        parameter: torch.Tensor = module.get_parameter("weight").detach()
        transposed = type(module).__name__ == "Conv1D"
        matrix = parameter.T if transposed else parameter.flatten(1)
        block = structure.block_of(name)
        yield Weight(name, block.layer if block else None, parameter, matrix, tuple(n for n, _ in others))
