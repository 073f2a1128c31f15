# SPDX-License-Identifier: Apache-2.0
"""`Calibration`: a context manager that measures a model while its user runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.errors import GateError, ModelError, UsageError
from calib.kernels import Kernel, make_kernel
from calib.kernels.plan import RowPlan
from calib.measurement.gates import every_site_fired, finite, passes_complete
from calib.measurement.site import Gate, Site
from calib.measurement.tracing import Group, Tracer
from calib.sites import Port, Selection, find_ports
from calib.sites.attention import watch_attention
from calib.sites.layout import to_blocks
from calib.statistics import Observation, TokenRatio

__all__ = ["Calibration"]


class Calibration:
    """Measures every site of a model during ordinary forward passes.

    ::

        with Calibration(model) as calibration:
            for batch in loader:
                model(**batch)
        sites = calibration.sites()

    Hooks exist only inside the context, whose end restores the model also after an exception; entering it again goes on
    measuring. The first forward pass finds out which ports see the same tensor; from then on each is read once. A small
    `probe` before it saves memory and makes the names of shards agree. Run under `torch.no_grad()`.

    Args:
        model: any module; transformers models are understood down to queries and keys.
        sites, ignore: patterns, see `sites.Selection`.
        statistics: ``full``, or ``ranges`` (extremes, counts and document maxima only).
        kernel: see `kernels.make_kernel`.
        threads: of the CPU kernel; torch's number by default. Results do not depend on it.
        sink_positions: how many first tokens of a row are kept apart from the rest.

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
        device = next((p.device.type for p in model.parameters()), "cpu")
        self._kernel: Kernel = make_kernel(
            kernel, device=device, full=statistics == "full", threads=threads or torch.get_num_threads()
        )
        self._stack = ExitStack()
        self._handles: dict[int, Any] = {}
        self._tracer: Tracer | None = Tracer()
        self._probing = False
        self._groups: list[Group] = []
        self._routes: dict[tuple[int, int], Group] = {}
        self._measuring: set[int] = set()
        self._calls: Counter[int] = Counter()
        self._fired: Counter[int] = Counter()
        self._entered = False
        self._depth = 0
        self._finished = True
        self._rows = 0
        self._annotation: dict[str, NDArray[Any]] = {}
        self._batch: tuple[int, int] | None = None
        self._context: Observation | None = None
        self._plans: dict[tuple[int, int, bool], RowPlan] = {}
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
        return None if self._probing else self._context

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
        self._stack.callback(self._remove_hooks)
        modules = dict(self.model.named_modules())
        reports: dict[int, dict[str, int]] = {}
        for number, port in enumerate(self.ports):
            if not self._needs(number):
                continue
            module = modules.get(port.module)
            if module is None:
                raise ModelError(f"{port.module}: is no longer in the model; make a new Calibration after changing it")
            if port.port in ("query", "key", "value"):
                reports.setdefault(id(module), {})[port.port] = number
            elif port.port == "input":
                self._handles[number] = module.register_forward_pre_hook(self._on_input(number), with_kwargs=True)
            else:
                self._handles[number] = module.register_forward_hook(self._on_output(number))
        self._stack.enter_context(watch_attention({key: self._on_attention(parts) for key, parts in reports.items()}))
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
        if self._depth:  # torch skips the closing hooks on an interrupt, which is no `Exception`
            self._depth = 1
            self._end()

    def annotate(
        self,
        *,
        document: NDArray[np.int64] | None = None,
        domain: NDArray[np.int16] | None = None,
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Says where the rows of the next forward pass come from.

        Args:
            document: int64 ``[rows]``; rows are numbered through if it is never given.
            domain: int16 ``[rows]``.
            valid: bool ``[rows, tokens]``, False on padding; read from ``attention_mask`` if it is not given.
        """
        given = {"document": document, "domain": domain, "valid": valid}
        self._annotation = {name: array for name, array in given.items() if array is not None}

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Within the block one forward pass, best a small one, finds out which ports see the same tensor.

        Nothing that it computes is counted. Without it the first counted pass does this work, while its activations
        come and go, which leaves the heap in pieces: 500 MB more on a model of 135 million parameters.

        Raises:
            UsageError: a forward pass was run before.
        """
        if self._tracer is None:
            raise UsageError("probe: the model was run before; probe first")
        self._probing, self._tracer = True, Tracer()
        try:
            yield
        finally:
            self._probing = False

    def sites(self) -> dict[str, Site]:
        """What was measured, by canonical name, in module order.

        Raises:
            GateError: no forward pass was run inside the context.
        """
        if self.forwards == 0:
            raise GateError("calibration: no forward pass was run; call the model inside the `with` block")
        found = []
        for group in self._groups:
            name, kind, aliases = group.named(self.ports, self._fired)
            if group.accumulator is not None:
                port = self.ports[min(group.members, key=lambda m: (self.ports[m[0]].sort_key, m[1]))[0]]
                ratios = next((self.token_ratios[m] for m in group.members if m in self.token_ratios), None)
                result = replace(group.accumulator.result(), ratios=ratios)
                site = Site(
                    name, kind, port.module, port.port, port.layer, group.dtype, group.channels, aliases, result
                )
                found.append((port.sort_key, name, site))
        return {name: site for _, name, site in sorted(found, key=lambda item: item[:2])}

    def silent_ports(self) -> list[str]:
        """Names of selected ports that no forward pass reached."""
        return sorted(
            port.name
            for number, port in enumerate(self.ports)
            if not self._fired[number] and self.selection.keeps([port.name], port.kind)
        )

    def gates(self) -> list[Gate]:
        """The conditions on the run itself: every site fired, all values finite, no pass broke off."""
        return [
            every_site_fired(len(self.ports), self.silent_ports()),
            finite(self.sites()),
            passes_complete(self.failed_forwards),
        ]

    def _roots(self) -> list[nn.Module]:
        """Modules that may be called from outside: the model, and the transformers models inside it."""
        inner = [m for m in self.model.modules() if m is not self.model and hasattr(m, "get_input_embeddings")]
        return [self.model, *inner]

    def _remove_hooks(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._finished = False
        self._calls.clear()
        self._plans.clear()
        self._batch, self._context = None, None
        tokens = _token_ids(args, kwargs)
        if tokens is None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.ndim), None)
            rows = 0 if first is None else first.shape[0]
        else:
            rows = tokens.shape[0]
            self._batch = (rows, tokens.shape[1])
            valid = self._annotation.get("valid")
            mask = kwargs.get("attention_mask")
            if valid is None and isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == tokens.shape:
                valid = mask.bool().cpu().numpy()
            ids = tokens.cpu().numpy() if not tokens.is_floating_point() else np.full(self._batch, -1, np.int64)
            self._context = Observation.of_tokens(
                ids.astype(np.int64).reshape(self._batch),
                document=self._documents(rows),
                domain=self._annotation.get("domain"),
                valid=valid,
                sink_positions=self.sink_positions,
            )
        self._annotation.setdefault("document", self._documents(rows))
        self._rows += 0 if self._probing else rows

    def _documents(self, rows: int) -> NDArray[np.int64]:
        given = self._annotation.get("document")
        return np.arange(self._rows, self._rows + rows) if given is None else given.astype(np.int64)

    def _complete(self, *_: Any) -> None:
        if self._depth == 1:
            self._finished = True

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._annotation = {}
        if not self._finished:
            self.failed_forwards += not self._probing
            if self._tracer is not None:  # half a pass tells nothing about who sees what: begin anew
                self._tracer = Tracer()
            else:
                self._fired |= self._calls
            return
        self._fired |= self._calls
        self.forwards += not self._probing
        if self._tracer is not None:
            self._freeze(self._tracer)

    def _freeze(self, tracer: Tracer) -> None:
        """Keeps one port per tensor, the first to see it, and drops the hooks of all others."""
        self._tracer = None
        for group in tracer.groups:
            name, kind, aliases = group.named(self.ports, self._fired)
            # patterns see names without the call
            names = [n.partition("#")[0] for n in (name, *aliases)]
            if self.selection.keeps(names, kind, aliases.values()):
                group.accumulator = group.accumulator or self._kernel.accumulator(group.channels)
                self._groups.append(group)
                self._routes[group.members[0]] = group
                self._measuring.add(group.members[0][0])
        if not self._groups:
            raise GateError("--sites/--ignore: no tensor of this model is left to measure; widen the patterns")
        for number in [n for n in self._handles if not self._needs(n)]:
            self._handles.pop(number).remove()

    def _needs(self, number: int) -> bool:
        """Whether a port must be watched: until the first pass all are, then those that measure or never fired."""
        return self._tracer is not None or not self._fired[number] or number in self._measuring

    def _on_input(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
            self._see(number, tensor)

        return hook

    def _on_output(self, number: int) -> Callable[..., None]:
        index = self.ports[number].index

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple | list):
                output = output[index] if index < len(output) else None
            self._see(number, output)

        return hook

    def _on_attention(self, parts: dict[str, int]) -> Callable[[str, torch.Tensor], None]:
        def report(part: str, tensor: torch.Tensor) -> None:
            if part in parts:
                self._see(parts[part], tensor)

        return report

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
        view, aligned = to_blocks(tensor, self.ports[number].axes, self._batch)
        if self._tracer is not None:
            group, new = self._tracer.find((number, call), tensor, view)
            if not new or self._probing:
                return
            group.accumulator = self._kernel.accumulator(group.channels)
        else:
            known = self._routes.get((number, call))
            if known is None:
                if call >= self._fired[number]:
                    self._take_late(number, call, tensor, view)
                known = self._routes.get((number, call))
                if known is None:
                    return
            group = known
        if view.shape[-1] != group.channels:
            raise ModelError(
                f"{self.ports[number].name}: had {group.channels} channels and now has {view.shape[-1]}; "
                "leave it out with --ignore"
            )
        assert group.accumulator is not None
        group.accumulator.update(view, self._plan(view, aligned=aligned))

    def _take_late(self, number: int, call: int, tensor: torch.Tensor, view: torch.Tensor) -> None:
        """A port fires for the first time, or more often than ever, after the first pass: a tensor of its own."""
        port = self.ports[number]
        if self.selection.keeps([port.name], port.kind):
            group = Group(
                [(number, call)],
                self._kernel.accumulator(view.shape[-1]),
                str(tensor.dtype).removeprefix("torch."),
                view.shape[-1],
            )
            self._groups.append(group)
            self._routes[number, call] = group
            self._measuring.add(number)

    def _plan(self, view: torch.Tensor, *, aligned: bool) -> RowPlan:
        """The row plan of a layout, made once per forward pass."""
        blocks, tokens = view.shape[:2]
        key = (blocks, tokens, aligned)
        plan = self._plans.get(key)
        if plan is None:
            if aligned and self._context is not None:
                context = self._context
            else:
                context = Observation.of_shape(blocks, tokens)
                documents = self._annotation.get("document")
                if documents is not None and documents.size == blocks:
                    domain = self._annotation.get("domain", context.domain)
                    context = Observation(context.group, documents, domain, context.token_id)
            plan = self._plans[key] = RowPlan.of(context)
        return plan


def _token_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Token ids ``[rows, tokens]`` of a forward pass, or embeddings in their place."""
    for name in ("input_ids", "decoder_input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor):
            return value if value.ndim == 2 else value[..., 0]
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 2 and not args[0].is_floating_point():
        return args[0]
    return None
