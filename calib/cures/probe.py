# SPDX-License-Identifier: Apache-2.0
"""`Probe`: asks a block which linear layers read a producer's output, and nothing but that output.

The producer's output is replaced by random values R, then by R scaled per channel. A linear layer whose input answers
in proportion can undo the scaling in its columns; once all of those do, nothing else in the block may differ: not the
input of any other layer, not the output of the block. Distinct scales tell which channel is which, scales that are
powers of two are undone without rounding. No parameter is touched: scaling rows is scaling outputs,
scaling columns is scaling inputs (`rules.py` checks both on the modules themselves).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.cures.linear import columns_of, is_linear
from calib.cures.relation import Relation, probe_scales, same
from calib.cures.scope import Call, Scope, tensors_in
from calib.sites.structure import is_norm, is_projection

__all__ = ["Finding", "Probe", "Trace"]

_ROUNDS = 4
_LOUD = (1.0, 1.0, 1.0, 30.0, 1.0, 1.0, 1.0, 1000.0)
"""Factors on successive tokens of R: a clamp (gpt_oss, olmo, dbrx) shows only to large values."""


@dataclass
class Trace:
    """What one run of a block saw.

    Attributes:
        reads: by layer, in order of execution, its input at each call, after compensation.
        outputs: tensors that the block returned.
    """

    reads: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Finding:
    """The answer for one set of rows of one producer.

    Attributes:
        consumers: name in the block -> int64 ``[inputs]``, index into the rows or -1.
        reason: why these consumers do not suffice; empty if they do.
        readers: layers that the reason is about, consumers or not.
    """

    consumers: dict[str, NDArray[np.int64]]
    reason: str = ""
    readers: tuple[str, ...] = ()


class Probe:
    """Questions to one block.

    Args:
        scope: the block.

    Attributes:
        layers: modules that hold weights and no projection below them: all that can read a tensor with a weight.
        calls: by layer, the arguments of its first call in the plain run.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.layers = {
            name: module
            for name, module in scope.module.named_modules()
            if module._parameters and not any(is_projection(m) for m in module.modules() if m is not module)
        }
        self.calls: dict[str, Call] = {}
        self._widths: dict[str, int] = {}
        self._plain = self._run(record_calls=True)

    @property
    def repeatable(self) -> bool:
        """Whether a second call of the block gives the same result; a block with a state does not."""
        return same(self._plain.outputs, self._run().outputs)

    def producers(self) -> list[str]:
        """Norms and linear layers that ran, in order of execution."""
        return [n for n in self._plain.reads if is_norm(self.layers[n]) or is_linear(self.layers[n])]

    def fired(self, name: str) -> bool:
        """Whether a layer was called in the plain run."""
        return name in self._plain.reads

    def channels(self, producer: str) -> int:
        """Size of the last axis of a producer's output; 0 if it returns no tensor."""
        return self._widths.get(producer, 0)

    def affected_widths(self, producer: str) -> list[int]:
        """Input widths of the linear layers whose input changes with the producer, in order of execution."""
        before = self._run(_Trial(producer))
        after = self._run(_Trial(producer, scales=probe_scales(self.channels(producer), 0)))
        changed = [n for n, reads in before.reads.items() if not same(reads, after.reads.get(n, []))]
        return list(dict.fromkeys(columns_of(self.layers[n]) for n in changed if is_linear(self.layers[n])))

    def ask(self, producer: str, rows: NDArray[np.int64]) -> Finding:
        """Who reads these rows of the producer's output, and whether they are all."""
        loud = rows if is_linear(self.layers[producer]) else rows[:0]
        before = self._run(_Trial(producer, loud))
        consumers: dict[str, NDArray[np.int64]] = {}
        direct: list[str] = []
        scales = probe_scales(rows.size, seed=rows.size)
        for _ in range(_ROUNDS):
            after = self._run(self._trial(producer, loud, rows, scales, consumers))
            relations = {n: Relation.between(r, after.reads.get(n, []), scales) for n, r in before.reads.items()}
            answers = {n: r.channels for n, r in relations.items() if n != producer and r.channels is not None}
            new = {n: c for n, c in answers.items() if is_linear(self.layers[n]) and n not in consumers}
            direct = [n for n in answers if n not in new]
            if not new:
                break
            consumers |= new
        if not consumers and not direct:
            return Finding({})
        # Powers of two commute with rounding: what is undone is undone to the bit, also before a steep softmax.
        scales = np.exp2(np.random.default_rng(rows.size).integers(1, 4, rows.size).astype(np.float64))
        after = self._run(self._trial(producer, loud, rows, scales, consumers))
        changed = [n for n, r in before.reads.items() if n != producer and not same(r, after.reads.get(n, []))]
        return self._judge(consumers, direct, changed, same(before.outputs, after.outputs))

    def _trial(
        self,
        producer: str,
        loud: NDArray[np.int64],
        rows: NDArray[np.int64],
        scales: NDArray[np.float64],
        consumers: Mapping[str, NDArray[np.int64]],
    ) -> _Trial:
        full = np.ones(self.channels(producer))
        full[rows] = scales
        return _Trial(producer, loud, full, {n: np.where(c < 0, 1.0, scales[c]) for n, c in consumers.items()})

    def _judge(
        self, consumers: dict[str, NDArray[np.int64]], direct: list[str], changed: list[str], outputs_equal: bool
    ) -> Finding:
        if direct:
            kind = type(self.layers[direct[0]]).__name__
            what = f"feeds {self._name(direct[0])} ({kind}), which is no linear layer"
            return Finding(consumers, what, (*consumers, *direct))
        if changed:
            reached = f"reaches {self._name(changed[0])}"
        elif not outputs_equal:
            reached = "leaves the block"
        else:
            return self._all_seen(consumers)
        what = f"also {reached} past its linear readers (a residual path or a non-linear function)"
        return Finding(consumers, what, tuple(consumers))

    def _all_seen(self, consumers: dict[str, NDArray[np.int64]]) -> Finding:
        """A layer that did not run (an expert without tokens) might read the same tensor."""
        widths = {c.size for c in consumers.values()}
        for name, module in self.layers.items():
            if name not in self._plain.reads and is_linear(module) and columns_of(module) in widths:
                what = f"may also feed {self._name(name)}, which saw no token"
                return Finding(consumers, what, (*consumers, name))
        return Finding(consumers)

    def _name(self, inner: str) -> str:
        return self.scope.full_name(inner)

    def _run(self, trial: _Trial | None = None, *, record_calls: bool = False) -> Trace:
        trace, hooks = Trace(), ExitStack()
        with hooks, torch.no_grad():
            for name, module in self.layers.items():
                undo = None if trial is None else trial.undo.get(name)
                calls = self.calls if record_calls else None
                hook = _reader(name, trace, undo, calls)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if record_calls:
                    hooks.callback(module.register_forward_hook(_meter(name, self._widths)).remove)
            if trial is not None:
                hook = _replacer(trial)
                hooks.callback(self.layers[trial.producer].register_forward_hook(hook).remove)
            trace.outputs = [t.clone() for t in self.scope.call()]
        return trace


@dataclass(frozen=True, eq=False)
class _Trial:
    """One experiment: the producer's output is noise times `scales`, consumers' inputs are divided by `undo`."""

    producer: str
    loud: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    scales: NDArray[np.float64] | None = None
    undo: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


def _reader(
    name: str, trace: Trace, undo: NDArray[np.float64] | None, calls: dict[str, Call] | None
) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if calls is not None:
            calls.setdefault(name, (args, dict(kwargs)))
        if undo is not None and args:
            args = (args[0] / torch.from_numpy(undo).to(args[0]), *args[1:])
        trace.reads.setdefault(name, []).extend(t.clone() for t in tensors_in([args, kwargs])[:1])
        return args, kwargs

    return hook


def _meter(name: str, widths: dict[str, int]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            widths[name] = output.shape[-1]

    return hook


def _replacer(trial: _Trial) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output
        noise = _noise_like(output, trial.loud)
        return noise if trial.scales is None else noise * torch.from_numpy(trial.scales).to(noise)

    return hook


def _noise_like(output: torch.Tensor, loud: NDArray[np.int64]) -> torch.Tensor:
    """Random values with the sizes of the channels of `output`, the same for each trial of one call.

    No channel is silent by accident; the channels `loud` have some tokens much larger than all others.
    """
    generator = torch.Generator().manual_seed(output.numel())
    values = torch.randn(output.shape, generator=generator).to(output)
    energy = output.float().reshape(-1, output.shape[-1]).square().mean(0)
    floor = (1e-3 * energy.mean().sqrt()).clamp_min(1e-6)
    values = values * energy.sqrt().maximum(floor).to(values)
    if output.ndim > 1 and loud.size:
        tokens = output.shape[-2]
        factor = torch.tensor(_LOUD).repeat(tokens // len(_LOUD) + 1)[:tokens, None].to(values)
        values[..., loud] = values[..., loud] * factor
    return values
