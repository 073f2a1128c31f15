# SPDX-License-Identifier: Apache-2.0
"""What a model computes on the way to its logits: feature maps and the embedding, found and taken by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.task import Task
from calib.errors import UsageError
from calib.models.evaluating import evaluating

__all__ = ["FeaturePoints", "View", "find_features", "look"]

_SEQUENCE_POINTS = 3


@dataclass(frozen=True)
class FeaturePoints:
    """Names of modules: those whose outputs are the feature maps, in the order of the computation, and the head."""

    maps: tuple[str, ...]
    head: str | None


@dataclass(frozen=True)
class View:
    """One forward pass: logits `[n, C]`, maps `[n, c, h, w]` (sequences: `[n, c, length, 1]`), embedding `[n, d]`.

    `labels` int64 `[n]`; `index` the number of each sample in its data set, int64 `[n]`, or None.
    """

    logits: Tensor
    labels: Tensor
    maps: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    index: Tensor | None = None


@dataclass
class _Seen:
    """What the hooks saw, in the order of the calls."""

    maps: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)


def find_features(model: nn.Module, task: Task, batch: Any) -> FeaturePoints:
    """Finds the feature maps and the head of any classifier from one batch.

    The head is the last linear layer that gives as many outputs as there are logits; its input is the embedding. The
    maps of a convolutional network are what enters the modules that lower the resolution, of several the outermost one
    that lowers it least: the outputs of stages. Those of a transformer are three layers of its longest module list, at
    one, two and three thirds of the depth.

    Args:
        model: a classifier; it comes back as it was.
        task: how it reads the batch.
        batch: one batch.
    """
    probe = _Probe()
    handles = [handle for name, module in model.named_modules() if name for handle in probe.attach(name, module)]
    try:
        with torch.no_grad(), evaluating(model):
            classes = task.decide(model, batch).logits.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    head = next((name for name, width in reversed(probe.linear) if width == classes), None)
    stages = probe.stages()
    if len(stages) > 1:
        return FeaturePoints(stages, head)
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = [[f"{name}.{n}" for n in range(size) if f"{name}.{n}" in probe.sequences] for name, size in lists]
    longest = max(layers, key=len, default=[])
    if not longest:
        return FeaturePoints(stages, head)
    count = min(_SEQUENCE_POINTS, len(longest))
    return FeaturePoints(tuple(longest[len(longest) * (k + 1) // count - 1] for k in range(count)), head)


class _Probe:
    """Notes, during one forward pass, who made which tensor and where the resolution falls."""

    def __init__(self) -> None:
        self.linear: list[tuple[str, int]] = []
        self.sequences: set[str] = set()
        self.maker: dict[int, str] = {}
        self.last: str | None = None
        self.falls: dict[int, tuple[float, int, str]] = {}
        self.order: dict[str, int] = {}
        self.alive: list[Any] = []  # tensors are told apart by id, which is theirs only while they live

    def attach(self, name: str, module: nn.Module) -> list[Any]:
        def before(module: nn.Module, inputs: Any) -> None:
            self.order[name] = len(self.alive)
            self.alive.append(inputs)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            found = _first(output)
            if not isinstance(found, Tensor):
                return
            if isinstance(module, nn.Linear):
                self.linear.append((name, found.shape[-1]))
            if found.dim() == 3:
                self.sequences.add(name)
            entered = inputs[0] if inputs else None
            if isinstance(entered, Tensor) and entered.dim() == 4 and found.dim() == 4:
                self._fall(name, entered, found)
            if found.dim() == 4 and found.shape[2] * found.shape[3] > 1:
                self.last = name
            self.alive.append(found)
            self.maker[id(found)] = name

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _fall(self, name: str, entered: Tensor, left: Tensor) -> None:
        maker, resolution = self.maker.get(id(entered)), entered.shape[2] * entered.shape[3]
        lowered = resolution / (left.shape[2] * left.shape[3])
        if maker is None or lowered <= 1:
            return
        found = (lowered, self.order[name], maker)
        self.falls[resolution] = min(found, self.falls.get(resolution, found))

    def stages(self) -> tuple[str, ...]:
        names = [maker for _, (_, _, maker) in sorted(self.falls.items(), reverse=True)]
        return tuple(dict.fromkeys([*names, *([self.last] if self.last else [])]))


def look(model: nn.Module, task: Task, batch: Any, points: FeaturePoints | None) -> View:
    """One forward pass with its features; gradients flow unless the caller forbids them.

    Args:
        model: a classifier.
        task: how it reads the batch.
        batch: one batch; positions that its `attention_mask` hides are 0 in the maps of a transformer.
        points: what to take; None takes only the logits.
    """
    if points is None:
        decisions = task.decide(model, batch)
        return View(decisions.logits, decisions.labels, index=decisions.index)
    with _hooks(model, points) as seen:
        decisions = task.decide(model, batch)
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    embedding = None if points.head is None else seen.heads[points.head]
    return View(
        logits=decisions.logits,
        labels=decisions.labels,
        maps=tuple(_as_map(seen.maps[name], mask) for name in points.maps),
        embedding=None if embedding is None else embedding.reshape(len(embedding), -1),
        index=decisions.index,
    )


@contextmanager
def _hooks(model: nn.Module, points: FeaturePoints) -> Iterator[_Seen]:
    seen, handles = _Seen(), []

    def after(name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.maps[name] = _first(output)

        return record

    def before(name: str) -> Any:
        def record(module: nn.Module, inputs: Any) -> None:
            seen.heads[name] = inputs[0]

        return record

    try:
        handles += [model.get_submodule(name).register_forward_hook(after(name)) for name in points.maps]
        if points.head is not None:
            handles.append(model.get_submodule(points.head).register_forward_pre_hook(before(points.head)))
        yield seen
    except AttributeError as error:
        raise UsageError(f"feature point: {error}; name modules of {type(model).__name__}") from error
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, Sequence) and not isinstance(output, str) and output else output


def _as_map(found: Tensor, mask: Tensor | None) -> Tensor:
    if found.dim() == 4:
        return found
    if mask is not None and mask.shape == found.shape[:2]:
        found = found * mask.to(found)[:, :, None]
    return found.transpose(1, 2)[..., None]
