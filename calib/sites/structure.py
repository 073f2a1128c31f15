# SPDX-License-Identifier: Apache-2.0
"""What a model is made of: blocks, attention, feed-forward, norms. Read from the model, never from a list of names.

transformers declares, on 375 of 530 modeling files, which classes are a model's blocks, attentions and routers
(`_can_record_outputs`); where it does not, a stack of blocks is a `ModuleList` of several children of one class that
contain linear layers, and attention is what dispatches to transformers' attention functions or fills a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from calib.sites.cache import attends, caches

__all__ = [
    "Block",
    "Structure",
    "cached_attentions",
    "inner_models",
    "is_activation",
    "is_norm",
    "is_projection",
    "output_width",
]


@dataclass
class Block:
    """One layer of a stack."""

    name: str
    module: nn.Module
    layer: int | None
    first: bool  # of its stack


@dataclass
class Structure:
    """The parts of one model, each with its fully qualified name."""

    order: dict[str, int]
    blocks: list[Block] = field(default_factory=list)
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    routers: dict[str, tuple[nn.Module, int]] = field(default_factory=dict)
    embedding: str | None = None
    embeddings: list[str] = field(default_factory=list)  # that look token ids up in the weight of `embedding`
    head: str | None = None
    width: int | None = None  # of the residual stream, where a configuration tells it

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Reads a model."""
        names = {module: name for name, module in model.named_modules()}
        structure = cls(order={name: i for i, (name, _) in enumerate(model.named_modules())})
        declared = _declared_classes(model)
        for module, name in names.items():
            if isinstance(module, declared.get("attentions", ())) or attends(module):
                structure.attentions[name] = module
        for target, index in _routers(model):
            for module, name in names.items():
                if isinstance(module, target):
                    structure.routers[name] = (module, index)
        blocks = [(n, m) for m, n in names.items() if isinstance(m, declared.get("hidden_states", ()))]
        if not blocks:
            blocks = list(_stacked(model))
        stacks: set[str] = set()
        for name, module in sorted(blocks, key=lambda item: structure.order[item[0]]):
            stack = name.rpartition(".")[0]
            structure.blocks.append(Block(name, module, _layer_index(name), stack not in stacks))
            stacks.add(stack)
        structure.embedding = _name_of(names, getattr(model, "get_input_embeddings", None))
        structure.head = _name_of(names, getattr(model, "get_output_embeddings", None))
        structure.embeddings = _lookups(model, names, structure.embedding)
        width = getattr(getattr(model, "config", None), "hidden_size", None)
        structure.width = width if isinstance(width, int) else None
        return structure

    def block_of(self, name: str) -> Block | None:
        """The innermost block that holds a module, if any."""
        held = [b for b in self.blocks if name == b.name or name.startswith(b.name + ".")]
        return max(held, key=lambda b: len(b.name), default=None)


def cached_attentions(model: nn.Module) -> list[str]:
    """Names of the attentions that are given a cache."""
    return [name for name, module in Structure.of(model).attentions.items() if caches(module)]


def inner_models(model: nn.Module) -> list[str]:
    """Names of the transformers models inside a model: its stack, an encoder, a tower for images or audio."""
    return [name for name, m in model.named_modules() if m is not model and hasattr(m, "get_input_embeddings")]


def is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight matrix: linear, transformers' transposed `Conv1D`, or a convolution."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return True
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def output_width(module: nn.Module) -> int | None:
    """Output channels of a projection."""
    width = next((w for a in ("out_features", "out_channels", "nf") if (w := getattr(module, a, None))), None)
    return width if isinstance(width, int) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises over channels. RMS norms have no common base class, so the class name decides."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or (
        "norm" in type(module).__name__.lower() and not isinstance(module, nn.Identity) and not list(module.children())
    )


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function, torch's or one of transformers' `ACT2FN`."""
    return type(module) in _activation_classes()


def _activation_classes() -> set[type]:
    classes: set[type] = {c for c in vars(nn.modules.activation).values() if isinstance(c, type)}
    try:
        from transformers.activations import ACT2CLS
    except ImportError:
        return classes - {nn.MultiheadAttention}
    declared = [c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()]
    return (classes | {c for c in declared if isinstance(c, type)}) - {nn.MultiheadAttention, nn.Module}


def _declared_classes(model: nn.Module) -> dict[str, tuple[type[nn.Module], ...]]:
    """Classes per recordable output over the model and its sub-models."""
    found: dict[str, list[type[nn.Module]]] = {}
    for module in model.modules():
        for output, targets in (getattr(module, "_can_record_outputs", None) or {}).items():
            for target in targets if isinstance(targets, list | tuple) else [targets]:
                cls = getattr(target, "target_class", target)
                if isinstance(cls, type):
                    key = "attentions" if "attentions" in output else output
                    key = "hidden_states" if "hidden_states" in output else key
                    found.setdefault(key, []).append(cls)
    return {output: tuple(dict.fromkeys(classes)) for output, classes in found.items()}


def _routers(model: nn.Module) -> Iterator[tuple[type[nn.Module], int]]:
    seen: set[Any] = set()
    for module in model.modules():
        targets = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for target in targets if isinstance(targets, list | tuple) else [targets]:
            cls, index = getattr(target, "target_class", target), getattr(target, "index", 0)
            if isinstance(cls, type) and (cls, index) not in seen:
                seen.add((cls, index))
                yield cls, index


def _stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of every outermost `ModuleList` or `Sequential` of at least two children of one class with weights."""
    taken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(f".{name}".startswith(t) for t in taken):
            continue
        children = list(module.children())
        same = len(children) > 1 and len({type(c) for c in children}) == 1
        if same and not is_projection(children[0]) and any(is_projection(m) for m in children[0].modules()):
            if isinstance(children[0], nn.ModuleList):  # a list of lists: their children are the blocks
                continue
            taken.append(f".{name}." if name else ".")
            yield from ((f"{name}.{key}" if name else key, child) for key, child in module.named_children())


def _lookups(model: nn.Module, names: dict[nn.Module, str], embedding: str | None) -> list[str]:
    """Input embeddings that are called: those of the stacks inside, where they hold the weight as modules of their own.

    BART's encoder and decoder each have one that is tied to the model's, which itself is never called.
    """
    if embedding is None:
        return []
    weight = getattr(model.get_submodule(embedding), "weight", None)
    inner = [_name_of(names, getattr(m, "get_input_embeddings", None)) for m in model.modules()]
    tied = [
        name
        for name in dict.fromkeys(inner)
        if name is not None and name != embedding and getattr(model.get_submodule(name), "weight", None) is weight
    ]
    return sorted(tied, key=list(names.values()).index) if tied else [embedding]


def _layer_index(name: str) -> int | None:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else None


def _name_of(names: dict[nn.Module, str], getter: Any) -> str | None:
    """Name of the module that a transformers getter returns; None where the model has no such thing."""
    if getter is None:
        return None
    try:
        module = getter()
    except (NotImplementedError, AttributeError):
        return None
    return names.get(module) if isinstance(module, nn.Module) else None
