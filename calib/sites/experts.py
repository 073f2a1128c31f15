# SPDX-License-Identifier: Apache-2.0
"""Fused experts: layers whose weight is one parameter for all experts, so that no module per expert can be hooked.

transformers 5 keeps the experts of a layer as ``[experts, ...]`` parameters and multiplies by them in one of several
ways (a loop, grouped or batched products). What all have in common is that a product takes that very memory, or rows
gathered from it, which `RoutedRows` recognises. So experts are measured as they run: nothing is unfused or replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from calib.sites.port import Port
from calib.sites.structure import Structure, is_projection

__all__ = ["ExpertBank", "find_banks", "find_routed_scopes", "is_expert_list"]

_DOWN = ("down", "w2", "wo", "output")
_COUNTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, eq=False)
class ExpertBank:
    """A fused weight of one module.

    Attributes:
        module: fully qualified name of the module that holds it.
        parameter: its name there.
        weight: ``[experts, ...]``, or two-dimensional with the experts' rows one after the other.
        biases: parameters of the same module that are added to the product.
        experts: how many.
        reads, makes: ports of what is multiplied and of the product; the first is None where another bank of the same
            module reads the same tensor.
    """

    module: str
    parameter: str
    weight: nn.Parameter
    biases: tuple[nn.Parameter, ...]
    experts: int
    reads: str | None
    makes: str

    def ports(self, order: int, layer: int | None) -> Iterator[Port]:
        """One port for all experts of each tensor; the sites are told apart by ``@expert``."""
        kinds = {"input": "expert_input", "hidden": "expert_hidden", "output": "expert_output"}
        for port in (self.reads, self.makes):
            if port is not None:
                yield Port(self.module, port, kinds.get(port, "expert_gate"), order, layer, "routed")


def find_banks(model: nn.Module) -> list[ExpertBank]:
    """The fused weights of a model, in module order.

    A module holds them if its class or its name speaks of experts and its parameters are its own, not of a projection.
    """
    return [bank for name, module in model.named_modules() for bank in _banks(name, module)]


def _banks(name: str, module: nn.Module) -> Iterator[ExpertBank]:
    if is_projection(module) or not (_speaks_of_experts(name, module) or _parent_class_speaks(module)):
        return
    count = next((n for a in _COUNTS if isinstance(n := getattr(module, a, None), int)), None)
    own = dict(module.named_parameters(recurse=False))
    fused: dict[str, tuple[nn.Parameter, int]] = {}
    for key, parameter in own.items():
        if not parameter.is_floating_point() or "bias" in key:
            continue
        if parameter.ndim == 3 and parameter.shape[0] > 1:
            fused[key] = parameter, parameter.shape[0]
        elif (
            parameter.ndim == 2
            and count is not None
            and count > 1
            and parameter.shape[0] % count == 0
            and not own.keys() - {"w1", "v1", "w2"}
        ):
            fused[key] = parameter, count
    read: set[str] = set()
    for key, (parameter, experts) in fused.items():
        down = any(word in key for word in _DOWN)
        if len(fused) == 1:
            reads, makes = "input", "output"
        else:
            reads, makes = ("hidden", "output") if down else ("input", key.removesuffix("_proj"))
        biases = tuple(b for other, b in own.items() if other != key and "bias" in other and key in other)
        yield ExpertBank(name, key, parameter, biases, experts, None if reads in read else reads, makes)
        read.add(reads)


def find_routed_scopes(model: nn.Module, banks: list[ExpertBank]) -> list[str]:
    """Modules inside which tokens are sent to experts: the first module above the experts that is none itself."""
    modules = dict(model.named_modules())
    held = [bank.module for bank in banks] + [name for name, module in modules.items() if is_expert_list(name, module)]
    scopes: dict[str, None] = {}
    for name in held:
        scope = name.rpartition(".")[0]
        while scope and _speaks_of_experts(scope, modules[scope]):
            scope = scope.rpartition(".")[0]
        scopes[scope] = None
    return [
        scope
        for scope in scopes
        if not any(scope.startswith(f"{other}.") or not other for other in scopes if other != scope)
    ]


def is_expert_list(name: str, module: nn.Module) -> bool:
    """Whether a module holds one module per expert."""
    return (
        isinstance(module, nn.ModuleList | nn.ModuleDict)
        and "expert" in name.rpartition(".")[2].lower()
        and len(module) > 1
    )


def _speaks_of_experts(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    return "experts" in last or "experts" in type(module).__name__.lower()


def _parent_class_speaks(module: nn.Module) -> bool:
    """Dbrx calls what one expert computes `ExpertGLU`, and keeps the weights of all experts there."""
    return "expert" in type(module).__name__.lower() and any(hasattr(module, name) for name in _COUNTS)


def bank_ports(banks: list[ExpertBank], structure: Structure) -> Iterator[Port]:
    """The ports of all banks."""
    for bank in banks:
        block = structure.block_of(bank.module)
        yield from bank.ports(structure.order[bank.module], block.layer if block is not None else None)


def slices_of(bank: ExpertBank, tensor: torch.Tensor) -> int | None:
    """Which expert's part of a bank a tensor is, if its memory is one; -1 if it is the whole."""
    if tensor.numel() == bank.weight.numel():
        return -1
    if tensor.numel() * bank.experts != bank.weight.numel():
        return None
    return (tensor.storage_offset() - bank.weight.storage_offset()) // tensor.numel()
