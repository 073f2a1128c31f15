# SPDX-License-Identifier: Apache-2.0
"""Finds the ports of a model: every place whose tensor a deployment may quantize or the paper measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from calib.errors import ModelError
from calib.sites.cache import calls_attention_interface, updates_cache
from calib.sites.experts import bank_ports, find_banks
from calib.sites.port import Axes, Port
from calib.sites.structure import Block, Structure, is_activation, is_norm, is_projection, output_width

__all__ = ["find_ports"]


def find_ports(model: nn.Module) -> list[Port]:
    """All ports of a model, in module order.

    Raises:
        ModelError: nothing that could be measured was found.
    """
    structure = Structure.of(model)
    found = [*_ports(model, structure), *bank_ports(find_banks(model), structure)]
    ports = {(port.name, port.kind, port.axes == "routed"): port for port in found}
    if not ports:
        raise ModelError(
            f"{type(model).__name__}: no linear layer, convolution, norm or block was found; "
            "calib measures modules, so pass the model whose forward pass you deploy"
        )
    return sorted(ports.values(), key=lambda p: (p.sort_key, p.kind))


def _ports(model: nn.Module, structure: Structure) -> Iterator[Port]:
    modules = dict(model.named_modules())

    def port(name: str, where: str, kind: str, **more: Any) -> Port:
        block = structure.block_of(name)
        layer = block.layer if block is not None else None
        return Port(name, where, kind, structure.order[name], layer, **more)

    for name in structure.embeddings:
        yield port(name, "output", "embedding", optional=len(structure.embeddings) > 1)
    for block in structure.blocks:
        yield from _block_ports(block, structure, port)
    for name in structure.attentions:
        attends, caches = calls_attention_interface(modules[name]), updates_cache(modules[name])
        if attends:
            for part in ("query", "key", "value"):
                yield port(name, part, part, axes="heads")
        if caches and attends and hasattr(modules[name], "kv_lora_rank"):  # it keeps a latent, not what it attends to
            for part in ("cache_key", "cache_value"):
                yield port(name, part, "kv_cache", axes="heads")
        elif caches and not attends and getattr(modules[name], "is_decoder", True) is not False:
            for part in ("key", "value"):
                yield port(name, part, part, axes="heads", cached=True)
    for name, (_, index) in structure.routers.items():
        yield port(name, "output", "router", index=index)
    yield from _module_ports(modules, structure, port)


def _module_ports(modules: dict[str, nn.Module], structure: Structure, port: Any) -> Iterator[Port]:
    """Norms, projections and activation functions, wherever they are."""
    fused = {bank.module for bank in find_banks(modules[""])}  # their activation is called once per expert
    for name, module in modules.items():
        inside = structure.block_of(name) is not None
        if is_norm(module):
            final = not inside and _after_blocks(name, structure)
            yield port(name, "output", "final_norm" if final else "norm_output")
            if inside:
                yield port(name, "input", "residual", weak=True)
        elif is_projection(module):
            axes: Axes = "channels_first" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "tokens"
            yield port(name, "input", "linear_input", axes=axes)
            if name != structure.head:
                yield port(name, "output", "linear_output", axes=axes)
        elif is_activation(module) and inside and name.rpartition(".")[0] not in fused:
            yield port(name, "input", "gate", optional=True)


def _block_ports(block: Block, structure: Structure, port: Any) -> Iterator[Port]:
    """Residual stream around a block, and the outputs of its attention and feed-forward halves."""
    if block.first:
        yield port(block.name, "input", "residual")
    yield port(block.name, "output", "residual")
    attention: list[tuple[str, nn.Module]] = []
    feed_forward: list[tuple[str, nn.Module]] = []
    for name, child in _parts(block):
        inside = [n for n in structure.attentions if n == name or n.startswith(name + ".")]
        (attention if inside or _mixes_tokens(child) else feed_forward).append((name, child))
    for name, child in attention:
        last = _last_projection(name, child, structure.width)
        if last is not None:
            yield port(last, "output", "attention_output")
    experts = [name for name, child in feed_forward if _has_experts(child)]
    for name in experts:
        yield port(name, "output", "mlp_output")
    if not experts:
        lasts = [_last_projection(name, child, structure.width) for name, child in feed_forward]
        found = [last for last in lasts if last is not None]
        if found:
            yield port(found[-1], "output", "mlp_output")


def _parts(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """Direct children of a block, looking through lists (T5 keeps its two halves in a `ModuleList`)."""
    for key, child in block.module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{block.name}.{key}.{inner}", part) for inner, part in child.named_children())
        else:
            yield f"{block.name}.{key}", child


def _mixes_tokens(module: nn.Module) -> bool:
    """Recurrent and linear-attention mixers, which no attention class declares: they hold a convolution or a state."""
    return any(isinstance(m, nn.Conv1d | nn.MultiheadAttention) for m in module.modules()) or any(
        n.rpartition(".")[2] in {"A_log", "dt_bias"} for n, _ in module.named_parameters()
    )


def _has_experts(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _last_projection(name: str, module: nn.Module, width: int | None) -> str | None:
    """Name of the projection that leads back to the residual stream: o_proj, down_proj, c_proj, dense ...

    The last in definition order of those as wide as the stream (Phi-3 defines o_proj before qkv_proj), else of all.
    """
    inner = [(n, m) for n, m in module.named_modules() if is_projection(m)]
    wide = [(n, m) for n, m in inner if width is not None and output_width(m) == width]
    if not inner:
        return None
    last = (wide or inner)[-1][0]
    return f"{name}.{last}" if last else name


def _after_blocks(name: str, structure: Structure) -> bool:
    """Whether a norm outside of all blocks is defined after a stack of blocks beside it: the final norm."""
    parent = name.rpartition(".")[0]
    before = [b for b in structure.blocks if b.name.startswith(parent + "." if parent else "")]
    return bool(before) and structure.order[name] > max(structure.order[b.name] for b in before)
