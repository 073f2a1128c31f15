# SPDX-License-Identifier: Apache-2.0
"""`Calibration`: a context manager that measures a model while its user runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.errors import GateError, ModelError, UsageError
from calib.kernels import Accumulator, Kernel, make_kernel
from calib.measurement.gates import (
    every_cache_seen,
    every_expert_routed,
    every_modality,
    every_site_fired,
    finite,
    passes_complete,
    reached,
)
from calib.measurement.hooks import PortHooks
from calib.measurement.modality import ModalityAccumulator, modality_tokens
from calib.measurement.passes import Passes
from calib.measurement.routed import RoutedSites
from calib.measurement.site import Gate, Site
from calib.measurement.tracing import Group, Tracer
from calib.sites import Port, Selection, find_ports
from calib.sites.layout import to_blocks
from calib.sites.structure import inner_models
from calib.sites.unused import WeightUse
from calib.statistics import Observation, SiteStatistics, TokenRatio

__all__ = ["Calibration"]


class Calibration:
    """Measures every site of a model during ordinary forward passes.

    ::

        with Calibration(model) as calibration:
            for batch in loader:
                model(**batch)
        sites = calibration.sites()

    Hooks exist only inside the context; its end restores the model also after an exception, entering it again goes on.
    The first forward pass finds out which ports see the same tensor; from then on each is read once. A small `probe`
    before it saves memory and makes the names of shards agree. Run under `torch.no_grad()`.

    Args:
        model: any module; transformers models are understood down to queries and keys.
        sites, ignore: patterns, see `sites.Selection`.
        statistics: ``full``, or ``ranges`` (extremes, counts and document maxima only).
        kernel: see `kernels.make_kernel`.
        threads: of the CPU kernel; torch's number by default. Results do not depend on it.
        sink_positions: how many first tokens of a row are kept apart from the rest.
        min_expert_tokens: fewest tokens that each expert must get for its gate to hold.
        force_experts: experts that get no token are measured too, on tokens sent to them regardless, and marked.
        keep_cache: whether caches keep what they are given. Without, keys and values are seen on their way into a
            cache that stays empty: for single passes over whole blocks.

    Raises:
        UsageError: a pattern matches nothing, an unknown kernel or kind of statistics.
        ModelError: the model has nothing to measure.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sites: Iterable[str] = (),
        ignore: Iterable[str] = (),
        statistics: str = "full",
        kernel: str = "auto",
        threads: int | None = None,
        sink_positions: int = 4,
        min_expert_tokens: int = 1,
        force_experts: bool = False,
        keep_cache: bool = True,
    ) -> None:
        if statistics not in ("full", "ranges"):
            raise UsageError(f"statistics {statistics!r}: unknown; choose full or ranges")
        if sink_positions < 0:
            raise UsageError(f"sink positions {sink_positions}: negative; pass 0 or more")
        self.model = model
        self.ports: list[Port] = find_ports(model)
        self.selection = Selection(sites, ignore)
        self.selection.check(self.ports)
        self.sink_positions = sink_positions
        self.min_expert_tokens = min_expert_tokens
        self._keep_cache = keep_cache
        device = next((p.device.type for p in model.parameters()), "cpu")
        threads = threads or torch.get_num_threads()
        self._kernel: Kernel = make_kernel(kernel, device=device, full=statistics == "full", threads=threads)
        self._stack = ExitStack()
        modalities = modality_tokens(model)
        self._apart = bool(modalities)
        self._passes = Passes(sink_positions, modalities)
        self._hooks = PortHooks(model, self.ports, self._passes, self._see, self._see_memory)
        self.routed = RoutedSites(
            model, self.ports, self.selection, self._passes, self._accumulator, forces=force_experts
        )
        self._tracer: Tracer | None = Tracer()
        self._traced = False
        self._use: WeightUse | None = None
        self._by_weight: set[str] = set()
        self._probing = False
        self._groups: list[Group] = []
        self._routes: dict[tuple[int, int], Group] = {}
        self._measuring: set[int] = set()
        self._calls: Counter[int] = Counter()
        self._fired: Counter[int] = Counter()
        self._entered = False
        self.token_ratios: dict[tuple[int, int], TokenRatio] = {}  # by port and call; a protocol's hooks fill it
        self.forwards = 0
        self.failed_forwards = 0

    @property
    def kernel_name(self) -> str:
        """Name of the kernel in use."""
        return self._kernel.name

    @property
    def context(self) -> Observation | None:
        """Tokens of the forward pass that runs: documents, groups, padding marked; None without ids, and in a probe."""
        return None if self._probing else self._passes.scope.context

    @property
    def watches_cache(self) -> bool:
        """Whether keys and values are seen only on their way into a cache, so that the model must be given one."""
        return self._hooks.watch_cache

    def __enter__(self) -> Self:
        if self._entered:
            raise UsageError("calibration: is already inside its `with` block; values would be counted twice")
        try:
            self._attach()
        except BaseException:
            self._stack.close()
            raise
        self._entered = True
        return self

    def _attach(self) -> None:
        """Sets all hooks; the stack takes them away again."""
        modules = self._hooks.attach(self._stack, self._needs, keep_cache=self._keep_cache)
        self._stack.callback(self.routed.close)
        for handle in self.routed.attach(modules):
            self._stack.callback(handle.remove)
        for module in self._roots():
            for handle in (
                module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._complete),
                module.register_forward_hook(self._end, always_call=True),
            ):
                self._stack.callback(handle.remove)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._kernel.close()
        self._entered = False
        while self._passes.depth:  # torch skips the closing hooks on an interrupt, which is no `Exception`
            self._end()

    def annotate(
        self,
        *,
        document: NDArray[np.int64] | None = None,
        domain: NDArray[np.int16] | None = None,
        valid: NDArray[np.bool_] | None = None,
        passes: int = 1,
    ) -> None:
        """Says where the rows of the next forward pass come from.

        Args:
            document: int64 ``[rows]``; rows are numbered through if it is never given.
            domain: int16 ``[rows]``.
            valid: bool ``[rows, tokens]``, False on padding; read from ``attention_mask`` if it is not given.
            passes: for how many passes this holds: one per new token in generation.
        """
        self._passes.annotated_passes = passes
        given = {"document": document, "domain": domain, "valid": valid}
        self._passes.annotation = {name: array for name, array in given.items() if array is not None}

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Within the block one forward pass, best a small one, finds out which ports see the same tensor.

        Nothing that it computes is counted. Without it the first counted pass does this work, while its activations
        come and go, which leaves the heap in pieces.

        Raises:
            UsageError: a forward pass was run before.
        """
        if self._traced:
            raise UsageError("probe: the model was run before; probe first")
        self._probing, self._tracer, self.routed.counting = True, Tracer(), False
        try:
            yield
        finally:
            self._probing, self.routed.counting = False, True

    def sites(self) -> dict[str, Site]:
        """What was measured, by canonical name, in module order.

        Raises:
            GateError: no forward pass was run inside the context.
        """
        if self.forwards == 0:
            raise GateError("calibration: no forward pass was run; call the model inside the `with` block")
        found = list(self.routed.sites(self._parts))
        for group in self._groups:
            name, kind, aliases = group.named(self.ports, self._fired)
            if group.accumulator is not None:
                first = min(group.members, key=lambda m: (self.ports[m[0]].sort_key, m[1]))
                port = self.ports[first[0]]
                ratios = next((self.token_ratios[m] for m in group.members if m in self.token_ratios), None)
                result = replace(group.accumulator.result(), ratios=ratios)
                part = name.partition("#")[0].rpartition(":")[2]
                order, parts = (*port.sort_key, first[1], -1), self._parts(group.accumulator)
                found.append(
                    Site(name, kind, port.module, part, port.layer, group.dtype, group.channels, aliases, result,
                         order, group.heads, parts=parts)
                )  # fmt: skip
        return {site.name: site for site in sorted(found, key=lambda site: (site.order, site.name))}

    def silent_ports(self) -> list[str]:
        """Names of selected ports that no forward pass reached, outside of a probe; padding does not count.

        Experts are told by `routed`, which knows them one by one.
        """
        return self._unseen(self.sites() if self.forwards else {})

    def _unseen(self, sites: dict[str, Site]) -> list[str]:
        spans = {name: site.statistics.range for name, site in sites.items()}
        empty = {name for name, span in spans.items() if not span.count_all + span.nonfinite_all}
        return sorted(empty | {self.ports[number].name for number in self._silent()})

    def _silent(self) -> set[int]:
        """Selected ports that never fired."""
        return {
            number
            for number, port in enumerate(self.ports)
            if not (self._fired[number] or port.optional or port.axes == "routed" or port.module in self._by_weight)
            and self.selection.keeps([port.name], port.kind)
        }

    def gates(self) -> list[Gate]:
        """The conditions on the run itself: every site fired, experts got tokens, values are finite, passes ended."""
        sites = self.sites()
        silent = self._unseen(sites)
        return [
            every_modality(self.model, self.ports, self.selection, {self.ports[n].module for n in self._fired}),
            every_site_fired(silent, reached(len(self.ports), self._by_weight)),
            every_cache_seen(self.model, self.ports, self.selection),
            every_expert_routed(self.routed.experts(), sites, self.min_expert_tokens),
            finite(sites),
            passes_complete(self.failed_forwards),
        ]

    def _accumulator(self, channels: int) -> Accumulator:
        return ModalityAccumulator(self._kernel, channels) if self._apart else self._kernel.accumulator(channels)

    def _parts(self, accumulator: Accumulator) -> dict[str, SiteStatistics]:
        return accumulator.parts() if isinstance(accumulator, ModalityAccumulator) else {}

    def _roots(self) -> list[nn.Module]:
        """Modules that may be called from outside: the model, and the transformers models inside it."""
        return [self.model, *(self.model.get_submodule(name) for name in inner_models(self.model))]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._passes.begin(args, kwargs, counted=not self._probing):
            self._calls.clear()
            self.routed.begin_pass()
            if not self._traced:
                self._use = WeightUse(self.model)
                self._use.__enter__()

    def _complete(self, *_: Any) -> None:
        if self._passes.depth == 1:
            self._passes.finished = True

    def _end(self, *hooked: Any) -> None:
        if not self._passes.end(hooked[-1] if hooked else None):
            return
        use, self._use = self._use, None
        if use is not None:
            use.__exit__(None, None, None)
            self._by_weight = use.modules({self.ports[number].module for number in self._calls})
        if not self._passes.finished:
            self.failed_forwards += not self._probing
        if not self._passes.finished and not self._traced:  # half a pass tells nothing about who sees what: begin anew
            self._tracer = Tracer()
            return
        self._fired |= self._calls
        self.forwards += self._passes.finished and not self._probing
        if self._tracer is not None:
            self._freeze(self._tracer)
        # what has not fired yet may do so in any pass, and share its tensor with something known
        self._tracer = Tracer(first=False) if self._silent() else None

    def _freeze(self, tracer: Tracer) -> None:
        """Keeps one port per tensor, the first to see it, and drops the hooks of all others."""
        self._traced = True
        for group in tracer.groups:
            name, kind, aliases = group.named(self.ports, self._fired)
            # patterns see names without the call
            names = [n.partition("#")[0] for n in (name, *aliases)]
            if self.selection.keeps(names, kind, aliases.values()):
                group.accumulator = group.accumulator or self._accumulator(group.channels)
                self._groups.append(group)
                self._routes[group.members[0]] = group
                self._measuring.add(group.members[0][0])
        self._tracer = None
        if tracer.first and not self._groups and not self.routed.wanted:
            raise GateError("--sites/--ignore: no tensor of this model is left to measure; widen the patterns")
        self._hooks.drop(self._needs)

    def _needs(self, number: int) -> bool:
        """Whether a port must be watched: until the first pass all are, then those that measure or never fired."""
        return not self._traced or not self._fired[number] or number in self._measuring

    def _see_memory(self, number: int, tensor: Any) -> None:
        """A port of what a decoder attends to: its rows are the encoder's tokens."""
        scope = self._passes.scope
        if scope.past:  # the encoder's keys come out of the cache as they were
            return
        self._passes.scope = scope.memory[1] if scope.memory is not None else scope
        try:
            self._see(number, tensor)
        finally:
            self._passes.scope = scope

    def _see(self, number: int, tensor: Any) -> None:
        """One port has a tensor: measure it, unless another port already did."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.numel():
            return
        call = self._calls[number]
        self._calls[number] += 1
        if tensor.dtype == torch.float64:
            raise ModelError(
                f"{self.ports[number].name}: float64 activations are not supported, their extremes would be rounded; "
                "load the model in float32"
            )
        group = self._routes.get((number, call))
        if group is None and self._tracer is None:
            if call < self._fired[number]:
                return
            self._tracer = Tracer(first=False)  # more calls than ever before
        view, aligned = to_blocks(tensor, self.ports[number].axes, self._passes.scope.batch)
        if self._tracer is not None:
            if self._hooks.reads_memory(number, tensor, self._passes.scope.memory):
                self._calls[number] -= 1
                self._see_memory(number, tensor)
                return
            group = self._trace(self._tracer, (number, call), tensor, view, group)
            if group is None:
                return
        assert group is not None
        if view.shape[-1] != group.channels:
            raise ModelError(
                f"{self.ports[number].name}: had {group.channels} channels and now has {view.shape[-1]}; "
                "leave it out with --ignore"
            )
        assert group.accumulator is not None
        if not aligned and self.routed.rows.active:
            rows = self.routed.rows.rows_of(tensor)
            view = view.reshape(1, -1, view.shape[-1])
            group.accumulator.update(view, self.routed.plan_of(rows, view.shape[1]))
        else:
            group.accumulator.update(view, self._passes.scope.plan(*view.shape[:2], aligned=aligned))

    def _trace(
        self, tracer: Tracer, seen: tuple[int, int], tensor: torch.Tensor, view: torch.Tensor, known: Group | None
    ) -> Group | None:
        """The group to measure a tensor for, while it is found out who sees what; None if another port did already."""
        number, call = seen
        if known is None and self._traced and call < self._fired[number]:
            return None
        group, new = tracer.find(seen, tensor, view, known)
        if known is None and self.ports[number].axes == "heads" and tensor.ndim == 4:
            group.heads = tensor.shape[1]
        if self._probing or not (new or known is not None):
            return None
        group.accumulator = group.accumulator or self._accumulator(group.channels)
        return group
