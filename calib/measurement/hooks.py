# SPDX-License-Identifier: Apache-2.0
"""`PortHooks`: all hooks of a calibration on the ports of a model, set and taken away together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError
from calib.measurement.passes import Passes
from calib.sites import Port
from calib.sites.attention import watch_attention
from calib.sites.cache import watch_cache

__all__ = ["PortHooks"]

See = Callable[[int, Any], None]


class PortHooks:
    """Hooks that hand on the tensors of ports.

    Args:
        model: the model.
        ports: all of its ports; those of fused experts have no hook.
        passes: which tokens run.
        see: called with the number of a port and its tensor.
        see_memory: the same for ports in `memory`, what a decoder attends to.
    """

    def __init__(self, model: nn.Module, ports: list[Port], passes: Passes, see: See, see_memory: See) -> None:
        self.model, self.ports, self._passes = model, ports, passes
        self.memory: set[int] = set()
        self._see, self._see_memory = see, see_memory
        self._modules: dict[str, nn.Module] = {}
        self._handles: dict[int, Any] = {}

    @property
    def watch_cache(self) -> bool:
        """Whether keys and values are seen only on their way into a cache, so that the model must be given one."""
        return any(port.cached or port.kind == "kv_cache" for port in self.ports)

    def attach(self, stack: ExitStack, needs: Callable[[int], bool], *, keep_cache: bool) -> dict[str, nn.Module]:
        """Sets the hooks of all ports that are needed; the stack takes them away again.

        Returns:
            The modules of the model by name.

        Raises:
            ModelError: a module is no longer there.
        """
        stack.callback(self._remove)
        modules = self._modules = dict(self.model.named_modules())
        attention: dict[int, dict[str, int]] = {}
        caches: dict[nn.Module, dict[str, int]] = {}
        for number, port in enumerate(self.ports):
            module = modules.get(port.module)
            if module is None:
                raise ModelError(f"{port.module}: is no longer in the model; make a new Calibration after changing it")
            if not needs(number):
                continue
            if port.cached or port.kind == "kv_cache":
                caches.setdefault(module, {})[port.port.removeprefix("cache_")] = number
            elif port.port in ("query", "key", "value"):
                attention.setdefault(id(module), {})[port.port] = number
            else:
                self._watch(number)
        stack.enter_context(watch_attention({key: self._on_attention(parts) for key, parts in attention.items()}))
        stack.enter_context(watch_cache({m: self._on_attention(p) for m, p in caches.items()}, stores=keep_cache))
        return modules

    def reads_memory(self, number: int, tensor: torch.Tensor, memory: tuple[torch.Tensor, Any] | None) -> bool:
        """Whether a port sees what a decoder attends to: a projection of it, its result, keys and values made of it."""
        if memory is None:
            return False
        port = self.ports[number]
        if port.port == "input" and tensor.untyped_storage() is memory[0].untyped_storage():
            self.memory |= {n for n, p in enumerate(self.ports) if p.module == port.module}
        elif port.port in ("key", "value"):
            inside = f"{port.module}."
            if any(self.ports[n].module.startswith(inside) for n in self.memory):
                self.memory.add(number)
        return number in self.memory

    def drop(self, needs: Callable[[int], bool]) -> None:
        """Takes away the hooks that are needed no more, and renews those of what turned out to be memory."""
        for number in list(self._handles):
            if not needs(number):
                self._handles.pop(number).remove()
            elif number in self.memory:
                self._handles.pop(number).remove()
                self._watch(number)

    def _remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _watch(self, number: int) -> None:
        port = self.ports[number]
        module = self._modules[port.module]
        if port.axes == "routed":
            return
        if port.port == "input":
            self._handles[number] = module.register_forward_pre_hook(self._on_input(number), with_kwargs=True)
        else:
            self._handles[number] = module.register_forward_hook(self._on_output(number))

    def _seer(self, number: int) -> See:
        """How a port is seen: among the tokens that run, or, in cross attention, those of the encoder."""
        return self._see_memory if number in self.memory else self._see

    def _on_input(self, number: int) -> Callable[..., None]:
        see = self._seer(number)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
            see(number, tensor)

        return hook

    def _on_output(self, number: int) -> Callable[..., None]:
        index, see = self.ports[number].index, self._seer(number)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple | list):
                output = output[index] if index < len(output) else None
            see(number, output)

        return hook

    def _on_attention(self, parts: dict[str, int]) -> Callable[[str, torch.Tensor], None]:
        def report(part: str, tensor: torch.Tensor) -> None:
            if part in parts:
                scope = self._passes.scope
                if scope.past and scope.batch is not None and part != "query":  # of earlier tokens all was seen before
                    tensor = tensor[:, :, -scope.batch[1] :]
                self._seer(parts[part])(parts[part], tensor)

        return report
