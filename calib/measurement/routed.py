# SPDX-License-Identifier: Apache-2.0
"""Statistics per expert of fused experts, and how many tokens each of them got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.errors import ModelError
from calib.kernels import Accumulator
from calib.measurement.passes import Passes, Scope
from calib.measurement.site import Site
from calib.sites import Port, Selection
from calib.sites.experts import find_banks, find_routed_scopes
from calib.sites.routing import Routed, RoutedRows
from calib.statistics import SiteStatistics

__all__ = ["RoutedSites"]

_FORCED_TOKENS = 256  # per pass: enough for a range, and a model of a hundred experts stays affordable
Key = tuple[int, int, int]
"""Port by its number, call, expert."""


@dataclass(eq=False)
class _Held:
    accumulator: Accumulator
    dtype: str
    channels: int
    tokens: int = 0


class RoutedSites:
    """What the experts of a model read and make.

    Args:
        model: the model.
        ports: all ports of the model; those of fused experts are told by their axes.
        selection: which of them are wanted.
        passes: which tokens run.
        accumulator: makes one for a number of channels.
        forces: experts that got no token are measured too, apart.
    """

    def __init__(
        self,
        model: nn.Module,
        ports: list[Port],
        selection: Selection,
        passes: Passes,
        accumulator: Callable[[int], Any],
        *,
        forces: bool = False,
    ) -> None:
        self._model, self._ports, self._passes, self._accumulator = model, ports, passes, accumulator
        self.banks = find_banks(model)
        self.scopes = find_routed_scopes(model, self.banks)
        self._numbers = {
            (port.module, port.port): number
            for number, port in enumerate(ports)
            if port.axes == "routed" and selection.keeps([port.name], port.kind)
        }
        self.rows = RoutedRows(self.banks, self._take)
        self.counting = True
        self.forces = forces
        self.forced = False
        self._held: dict[tuple[Key, bool], _Held] = {}
        self._calls: Counter[str] = Counter()
        self._most_calls: Counter[str] = Counter()
        self._running: list[str] = []
        self._scope: Scope = Scope()
        self._lead: tuple[int, ...] = ()
        self._plans: dict[bytes, Any] = {}

    @property
    def wanted(self) -> bool:
        """Whether anything of an expert is measured."""
        return bool(self._numbers)

    def attach(self, modules: dict[str, nn.Module]) -> Iterator[Any]:
        """Sets the hooks of all scopes and yields their handles."""
        for name in self.scopes:
            yield modules[name].register_forward_pre_hook(self._enter(name), with_kwargs=True)
            yield modules[name].register_forward_hook(self._leave, always_call=True)
        for name in dict.fromkeys(bank.module for bank in self.banks) if self.forces else ():
            yield modules[name].register_forward_hook(self._force(name), with_kwargs=True)

    def begin_pass(self) -> None:
        """A new forward pass: calls are counted anew."""
        self._most_calls |= self._calls
        self._calls.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = next(
                (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()), None
            )
            if self._running or tensor is None or tensor.ndim < 2:
                self._running.append("")
                return
            self._running.append(name)
            self._scope, self._lead = self._passes.scope, tuple(tensor.shape[:-1])
            self._plans.clear()
            self.rows.begin(tensor)

        return hook

    def _leave(self, *_: Any) -> None:
        if not self._running:
            return
        name = self._running.pop()
        if name:
            self.rows.end()
            self._calls[name] += 1

    def _force(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.forced:
                self.force(module, args, kwargs, name)

        return hook

    def force(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """Sends tokens of this pass to the experts of a module that got none so far, and measures them apart.

        What the model computes is not changed: the results are dropped. Only modules that are called with hidden
        states, expert indices and weights ``[tokens, k]`` can be called like this.
        """
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        if len(given) < 3 or given[1].is_floating_point() or not self.counting:
            return
        numbers = {number for (module, _), number in self._numbers.items() if module == name}
        fed = {key[2] for (key, forced), held in self._held.items() if key[0] in numbers and held.tokens and not forced}
        unrouted = [e for e in range(next(b.experts for b in self.banks if b.module == name)) if e not in fed]
        hidden = given[0].reshape(-1, given[0].shape[-1])[:_FORCED_TOKENS]
        self.forced = True
        try:
            for expert in unrouted:
                index = torch.full((hidden.shape[0], 1), expert, dtype=given[1].dtype, device=given[1].device)
                type(module).forward(module, hidden, index, torch.ones_like(index, dtype=given[2].dtype))
        finally:
            self.forced = False

    def close(self) -> None:
        """Ends a scope that an interrupt left open."""
        self._running.clear()
        self.rows.end()

    def plan_of(self, rows: torch.Tensor | None, count: int) -> Any:
        """The row plan of values ``[rows, channels]`` whose token numbers are known, or not."""
        numbers = None if rows is None else rows.cpu().numpy()
        key = count.to_bytes(8, "little") if numbers is None else numbers.tobytes() + b"r"
        plan = self._plans.get(key)
        if plan is None:
            batch = self._scope.batch
            aligned = batch is not None and self._lead in {batch, (batch[0] * batch[1],)}
            if numbers is None or not aligned:
                plan = Scope().plan(1, count, aligned=False)
            else:
                plan = self._scope.routed(numbers.astype(np.int64))
            self._plans[key] = plan
        return plan

    def _take(self, routed: Routed) -> None:
        number = self._numbers.get((routed.bank.module, routed.port))
        if number is None or not self.counting:
            return
        if routed.values.dtype == torch.float64:
            raise ModelError(
                f"{self._ports[number].name}@{routed.expert}: float64 activations are not supported, their extremes "
                "would be rounded; load the model in float32"
            )
        call = self._calls[self._running[0]] if self._running else 0
        key = (number, call, routed.expert), self.forced
        channels = routed.values.shape[-1]
        held = self._held.get(key)
        if held is None:
            dtype = str(routed.values.dtype).removeprefix("torch.")
            held = self._held[key] = _Held(self._accumulator(channels), dtype, channels)
        values = routed.values.detach().unsqueeze(0)
        plan = self.plan_of(routed.rows, values.shape[1])
        held.accumulator.update(values, plan)
        held.tokens += plan.rows.size

    def sites(self, parts: Callable[[Any], dict[str, SiteStatistics]]) -> Iterator[Site]:
        """What was measured of each expert; what it got by force counts only if nothing was routed to it."""
        self.begin_pass()
        several = {name for name, calls in self._most_calls.items() if calls > 1}
        for (key, forced), held in sorted(self._held.items(), key=lambda item: item[0]):
            number, call, expert = key
            if not held.tokens or (forced and self._tokens(key)):
                continue
            port = self._ports[number]
            result = held.accumulator.result()
            repeated = any(port.module.startswith(f"{name}.") for name in several)
            name = port.name + (f"#{call}" if repeated else "") + f"@{expert}"
            yield Site(
                name,
                port.kind,
                port.module,
                port.port,
                port.layer,
                held.dtype,
                held.channels,
                {},
                result,
                order=(*port.sort_key, call, expert),
                parts=parts(held.accumulator),
                expert=expert,
                forced=forced,
            )

    def experts(self) -> list[str]:
        """Names of all experts of which something is wanted, ``module@expert``."""
        wanted = {module for module, _ in self._numbers}
        return list(
            dict.fromkeys(f"{b.module}@{e}" for b in self.banks if b.module in wanted for e in range(b.experts))
        )

    def _tokens(self, key: Key) -> int:
        held = self._held.get((key, False))
        return 0 if held is None else held.tokens
