# SPDX-License-Identifier: Apache-2.0
"""`find_pairs`: block by block, which norm or linear layer feeds which linear layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.cures.input_rotation import rotation_of
from calib.cures.linear import is_linear
from calib.cures.pairs import Consumer, Pair, Pairs
from calib.cures.probe import Finding, Probe
from calib.cures.relation import probe_scales
from calib.cures.rules import consumer_scales, producer_rule
from calib.cures.scope import Scope, capture_scopes, example_inputs
from calib.cures.slices import row_slices
from calib.sites.structure import is_norm, is_projection

__all__ = ["find_pairs"]


def find_pairs(model: nn.Module, example: torch.Tensor | Mapping[str, torch.Tensor] | None = None) -> Pairs:
    """Finds every pair inside the blocks of a model. The model is only run; nothing in it is changed.

    Args:
        model: on any device, in any dtype; blocks in half precision are probed in a float32 copy, one at a time.
        example: int64 token ids ``[rows, tokens]``, or keyword arguments of the forward pass, or none for random
            tokens. At least 16 tokens should be there.

    Returns:
        The pairs, and for every other layer with weights why it is in none.

    Raises:
        ModelError: the model does not run on the example, or does not read tokens and no example is given.
    """
    if isinstance(example, Mapping):
        inputs: Mapping[str, torch.Tensor] | torch.Tensor = example
    elif example is not None and getattr(model, "config", None) is None:
        inputs = example
    else:
        inputs = example_inputs(model, example)
    search = _Search(model)
    for scope in capture_scopes(model, inputs):
        search.add(scope)
    return Pairs(tuple(search.pairs), search.reasons())


@dataclass
class _Known:
    """What the first block of a shape taught: its producers with their rows, and its reasons."""

    block: str
    rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class _Search:
    """Goes through the blocks; one of a known shape is asked only about the producers of the first of that shape."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pairs: list[Pair] = []
        self._reasons: dict[str, str] = {}
        self._scopes: list[str] = []
        self._known: dict[object, _Known] = {}
        self._claimed: dict[str, NDArray[np.bool_]] = {}
        self._holders: dict[int, list[str]] = {}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in self._parameters.items():
            self._holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])

    def add(self, scope: Scope) -> None:
        """Adds the pairs of one block."""
        self._scopes.append(scope.name)
        probe = Probe(scope)
        shape = _shape(scope.module)
        known = self._known.get(shape)
        if known is not None and self._repeat(probe, known):
            return
        before = set(self._reasons)
        found = self._known[shape] = _Known(scope.name)
        if probe.repeatable:
            self._explore(probe, found)
        else:
            for name in probe.layers:
                self._refuse(scope.full_name(name), f"{scope.name or 'the model'} has a state: a second call differs")
        found.reasons = {n: r for n, r in self._reasons.items() if n not in before}

    def _explore(self, probe: Probe, found: _Known) -> None:
        for producer in probe.producers():
            rows = np.arange(probe.channels(producer))
            if not rows.size:
                continue
            finding = probe.ask(producer, rows)
            if not finding.readers and not finding.consumers and is_linear(probe.layers[producer]):
                rows, finding = _fused(probe, producer, rows, finding)
            pair = self._decide(probe, producer, rows, finding)
            if pair is not None:
                found.rows[producer] = rows
                self._keep(pair)

    def _repeat(self, probe: Probe, known: _Known) -> bool:
        """Adds to one block the pairs of another of the same shape; False, and adds none, if one does not hold."""
        if not probe.repeatable:
            return False
        pairs = [self._decide(probe, name, rows, probe.ask(name, rows)) for name, rows in known.rows.items()]
        if any(pair is None for pair in pairs):
            return False
        for pair in pairs:
            assert pair is not None
            self._keep(pair)
        block = re.compile(rf"(?<![\w.]){re.escape(known.block)}\.")

        def moved(text: str) -> str:
            return block.sub(f"{probe.scope.name}.", text)

        for name, reason in known.reasons.items():
            self._refuse(moved(name), moved(reason))
        return True

    def _decide(self, probe: Probe, producer: str, rows: NDArray[np.int64], finding: Finding) -> Pair | None:
        """The pair if all holds; else None, and its readers know why."""
        name, module, reason, rule = probe.scope.full_name(producer), probe.layers[producer], finding.reason, None
        consumers = {probe.scope.full_name(inner): inner for inner in finding.consumers}
        if consumers and not reason:
            scales = np.ones(probe.channels(producer))
            scales[rows] = probe_scales(rows.size, seed=1)
            if next(module.parameters(), None) is not None:  # a norm may have no weight
                rule = producer_rule(module, probe.calls[producer], _of(scales, module))
            reason = self._tied([name, *consumers])
            if rule is None:
                reason = reason or f"is a {type(module).__name__} that its own weight does not scale"
        for full, inner in consumers.items():
            layer, channels = probe.layers[inner], finding.consumers[inner]
            undo = np.where(channels < 0, 1.0, probe_scales(rows.size, seed=1)[channels])
            if not reason and not consumer_scales(layer, probe.calls[inner], _of(undo, layer)):
                reason = f"also feeds {full}, which its columns do not scale"
            if not reason and (self._claimed.get(full, np.zeros(1, np.bool_)) & (channels >= 0)).any():
                return None
        if reason:
            for inner in finding.readers or finding.consumers:
                if not is_norm(probe.layers[inner]):
                    self._refuse(probe.scope.full_name(inner), f"fed by {name}, which {reason}")
            return None
        if rule is None:
            return None
        readers = tuple(Consumer(full, finding.consumers[inner]) for full, inner in consumers.items())
        return Pair(name, rows, rows.size == probe.channels(producer), readers, rule)

    def _keep(self, pair: Pair) -> None:
        self.pairs.append(pair)
        for consumer in pair.consumers:
            taken = self._claimed.get(consumer.module, np.zeros(consumer.channels.size, np.bool_))
            self._claimed[consumer.module] = taken | (consumer.channels >= 0)

    def _tied(self, names: list[str]) -> str:
        """Why parameters of these modules cannot change; empty if they can."""
        for name in names:
            for key, parameter in self.model.get_submodule(name).named_parameters(recurse=False):
                others = [h for h in self._holders[id(parameter)] if h != name]
                if others:
                    return f"needs to change {name}, whose {key} is tied to {others[0]}"
        return ""

    def _refuse(self, name: str, reason: str) -> None:
        self._reasons.setdefault(name, reason)

    def reasons(self) -> dict[str, str]:
        """Why each layer with a weight matrix is the consumer of no pair, in module order."""
        result = {}
        for name, module in self.model.named_modules():
            if name in self._claimed or isinstance(module, nn.Embedding) or not _reads(module):
                continue
            block = next((s for s in self._scopes if not s or name.startswith(s + ".")), None)
            if rotation_of(module) is not None:
                result[name] = "its input is rotated as it arrives; find and smooth pairs before that"
            elif name in self._reasons:
                result[name] = self._reasons[name]
            elif block is None:
                result[name] = "not inside a block; smoothing works within blocks"
            elif not is_linear(module):
                result[name] = f"a {type(module).__name__} is no linear layer: nothing can be folded into it"
            else:
                result[name] = (
                    "nothing in its block feeds it in proportion: it reads the residual stream or follows a "
                    "non-linear function"
                )
        return result


def _fused(probe: Probe, producer: str, rows: NDArray[np.int64], finding: Finding) -> tuple[NDArray[np.int64], Finding]:
    """Tries parts of a fused projection; the first that feeds a consumer in proportion, else what was given."""
    for width in probe.affected_widths(producer):
        for part in row_slices(rows.size, width):
            answer = probe.ask(producer, part)
            if answer.consumers and not answer.reason:
                return part, answer
    return rows, finding


def _shape(block: nn.Module) -> object:
    """Equal for blocks with the same modules and the same sizes of parameters."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _reads(module: nn.Module) -> bool:
    """Whether a module holds a weight matrix itself: a projection, a router, a stack of experts."""
    below = any(is_projection(m) for m in module.modules() if m is not module)
    return not below and not is_norm(module) and any(p.ndim > 1 for p in module.parameters(recurse=False))


def _of(scales: NDArray[np.float64], module: nn.Module) -> torch.Tensor:
    return torch.from_numpy(scales).to(next(module.parameters()).device, torch.float32)
