# SPDX-License-Identifier: Apache-2.0
"""`Scope`: one block of a model together with the arguments that the model calls it with.

Producers and their consumers sit in one block, so a block alone, called again with the arguments of one real forward
pass, decides on them. That costs a block per question in place of a model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError
from calib.models.device import input_device
from calib.models.evaluating import evaluating
from calib.sites.structure import Structure

__all__ = ["Scope", "capture_scopes", "example_inputs", "map_tensors", "tensors_in"]

_TOKENS = 32
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Scope:
    """A block in float32 and its calls.

    Attributes:
        name: of the block; empty for the model itself.
        module: the block, or a float32 copy of it where the model's own is in another dtype.
        calls: positional and keyword arguments, floating-point tensors in float32.
    """

    name: str
    module: nn.Module
    calls: list[Call]

    @classmethod
    def of(cls, name: str, module: nn.Module, calls: list[Call]) -> Scope:
        """Of a block of any dtype; half precision would hide in its rounding what a probe looks for."""
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
            module = copy.deepcopy(module).float()
        return cls(name, module, [map_tensors(call, _to_float32) for call in calls])

    def full_name(self, inner: str) -> str:
        """Name in the model of a module of this block."""
        return ".".join(part for part in (self.name, inner) if part)

    def call(self) -> list[torch.Tensor]:
        """All floating-point tensors that the block returns, over all its calls."""
        return [t for args, kwargs in self.calls for t in tensors_in(self.module(*args, **kwargs))]


def capture_scopes(model: nn.Module, inputs: Mapping[str, torch.Tensor] | torch.Tensor) -> Iterator[Scope]:
    """The blocks of a model in module order, with the arguments of one forward pass over `inputs`.

    A model in which no stack of blocks is found is one scope as a whole. Use it inside `evaluating(model)`.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    calls: dict[str, list[Call]] = {}
    blocks = {block.name: block.module for block in Structure.of(model).blocks} or {"": model}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(map_tensors((args, dict(kwargs)), torch.Tensor.clone))

        return hook

    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for name, module in blocks.items():
            hooks.callback(module.register_forward_pre_hook(keep(name), with_kwargs=True).remove)
        try:
            if isinstance(inputs, torch.Tensor):
                model(inputs)
            else:
                model(**inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ModelError(
                f"{type(model).__name__}: does not run on the example inputs ({error}); pass inputs that it takes"
            ) from error
    with evaluating(model):
        for name, module in blocks.items():
            if name in calls:
                yield Scope.of(name, module, calls.pop(name))


def example_inputs(model: nn.Module, tokens: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Keyword arguments for a transformers model of tokens; random tokens where none are given.

    Args:
        model: any model with a transformers configuration.
        tokens: int64 ``[rows, tokens]``.

    Raises:
        ModelError: the model does not read tokens, so inputs must be given.
    """
    config = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters
    if config is None or "input_ids" not in parameters:
        raise ModelError(f"{type(model).__name__}: does not read tokens; pass a dictionary of example inputs")
    if tokens is None:
        vocabulary = int(config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary, (1, _TOKENS), generator=generator)
    device = input_device(model)
    inputs: dict[str, Any] = {"input_ids": tokens.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False  # a cache would make a second call of a block another one
    return inputs


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`function` on every tensor inside nested tuples, lists and dictionaries; all else as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(v, function) for v in value)
    if type(value) is dict:
        return {key: map_tensors(v, function) for key, v in value.items()}
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors inside nested tuples, lists and mappings, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_in(v)]
    return []


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
