# SPDX-License-Identifier: Apache-2.0
"""Where the error comes from: every planned tensor of the running quantized model beside the same one in float.

Two errors of a tensor. *Isolated*: its quantizer applied to the float tensor; what a scale file expects, `expected`, is
this error on the calibration data. *Running*: the tensor inside of the quantized model, after all that was rounded
before it, against the float model on the same batch. An input that is fine by itself and bad when running got its error
from the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from calib.errors import UsageError
from calib.evaluation.measured_error import ErrorSum, MeasuredError
from calib.evaluation.watch import Watch
from calib.quantized.model import QuantizedModel
from calib.quantized.plan import QuantizationPlan
from calib.quantized.quantizers import StaticQuantizer, TensorQuantizer
from calib.quantized.rounding import round_to_nearest
from calib.quantized.weights import QuantizedWeight, as_matrix
from calib.schema.scales import ExpectedError, ScaleFile, TensorScale

__all__ = ["LARGEST_DIFFERENCE_DB", "LayerErrors", "TensorError", "layer_errors"]

LARGEST_DIFFERENCE_DB = 0.5
"""Expected and measured error should not be further apart."""

Batch = Mapping[str, Any] | torch.Tensor


@dataclass(frozen=True)
class TensorError:
    """Errors of one tensor.

    Attributes:
        name: of the first module that reads it, ``module:input``; ``module:weight``, ``module:output``, ``module:key``.
        isolated: of its own rounding; None if it is not rounded.
        running: inside of the quantized model, as the next operation reads it; None for weights, and where a batch
            sent other tokens there (experts).
        expected: of the scale file, if the plan uses that very scale.
    """

    name: str
    isolated: MeasuredError | None
    running: MeasuredError | None
    expected: ExpectedError | None

    @property
    def difference_db(self) -> float | None:
        """Isolated SQNR minus the expected one; None where one of them is not known."""
        if self.isolated is None or self.expected is None:
            return None
        measured, expected = self.isolated.sqnr_db, self.expected.sqnr_db
        return None if measured is None or expected is None else measured - expected


@dataclass(frozen=True)
class LayerErrors:
    """Errors of all tensors, by name, in the order of the pass; weights come first."""

    tensors: dict[str, TensorError]

    def worst(self, count: int = 10) -> list[TensorError]:
        """Tensors with the lowest running SQNR."""
        known = [t for t in self.tensors.values() if t.running is not None and t.running.sqnr_db is not None]
        return sorted(known, key=lambda t: _sqnr(t.running))[:count]

    @property
    def median_difference_db(self) -> float | None:
        """Median over tensors of the absolute difference between isolated and expected SQNR."""
        found = [abs(d) for t in self.tensors.values() if (d := t.difference_db) is not None]
        return median(found) if found else None

    def disagreements(self, limit: float = LARGEST_DIFFERENCE_DB) -> list[TensorError]:
        """Tensors whose isolated SQNR is further than this from the expected one, furthest first."""
        found = [t for t in self.tensors.values() if abs(t.difference_db or 0.0) > limit]
        return sorted(found, key=lambda t: -abs(t.difference_db or 0.0))


def layer_errors(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: QuantizationPlan,
    *,
    scales: ScaleFile | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerErrors:
    """Errors of every planned input, weight, key and value, and of the outputs of the planned modules.

    Positions that the plan leaves in float do not count. An input that several modules read counts once, if a scale
    file says so. Memory: all inputs and outputs of planned modules of one batch, so let a batch be a row or two.

    Args:
        model: the float model.
        batches: arguments of a forward pass each: by name, or one tensor.
        plan: what the quantized model rounds.
        scales: says which inputs are one tensor, and what error to expect.
        progress: called with the number of batches done.

    Raises:
        UsageError: no batch, or the plan does not fit.
        GateError: a value was NaN or infinite.
    """
    readers = {} if scales is None else {r: (n, t) for n, t in scales.tensors.items() for r in [n, *t.shared_with]}
    found = _Comparison(readers)
    found.weights(model, plan)
    done = 0
    for batch in batches:
        found.begin()
        with Watch(model, plan, found.exact):
            _forward(model, batch)
        found.seen.clear()
        with Watch(model, plan, found.running, quantized=QuantizedModel(model, plan)):
            _forward(model, batch)
        done += 1
        if progress is not None:
            progress(done)
    if not done:
        raise UsageError("layer errors: no batch; give at least one")
    return LayerErrors(found.errors())


class _Comparison:
    """Sums by tensor, and the float tensors of the batch that is running."""

    def __init__(self, readers: Mapping[str, tuple[str, TensorScale]]) -> None:
        self._readers = readers
        self._held: dict[str, torch.Tensor] = {}
        self._isolated: dict[str, ErrorSum] = {}
        self._running: dict[str, ErrorSum] = {}
        self._expected: dict[str, ExpectedError] = {}
        self._first: dict[tuple[str, str], str] = {}
        self._rerouted: set[str] = set()
        self.seen: set[str] = set()

    def begin(self) -> None:
        """Forgets the batch before."""
        self._held.clear()
        self.seen.clear()

    def weights(self, model: nn.Module, plan: QuantizationPlan) -> None:
        """Isolated errors of the planned weights."""
        for module_name, planned in plan.weights.items():
            module = model.get_submodule(module_name)
            matrix = as_matrix(module, module.get_parameter("weight").detach())
            codes = planned if isinstance(planned, QuantizedWeight) else round_to_nearest(matrix, planned, module_name)
            name, tensor = self._named(f"{module_name}:weight")
            # a tied weight is one tensor, however many modules read it
            if name not in self._isolated:
                self._isolated[name] = ErrorSum(name)
                self._isolated[name].add(matrix, codes.dequantize())
            if tensor is not None and not isinstance(planned, QuantizedWeight) and planned.scale is not None:
                self._expected[name] = tensor.expected

    def exact(self, name: str, quantizer: TensorQuantizer | None, x: torch.Tensor) -> None:
        """A tensor of the float model."""
        name, tensor = self._named(name)
        if name in self.seen:
            return
        self.seen.add(name)
        self._held[name] = x.detach().clone()  # a model may write into it later
        self._running.setdefault(name, ErrorSum(name))
        if quantizer is None or not x.numel():
            return
        self._isolated.setdefault(name, ErrorSum(name)).add(x, quantizer.to(x.device)(x))
        if tensor is not None and _is_of(quantizer, tensor):
            self._expected[name] = tensor.expected

    def running(self, name: str, quantizer: TensorQuantizer | None, x: torch.Tensor) -> None:
        """The same tensor of the quantized model."""
        name, _ = self._named(name)
        if name in self.seen:
            return
        self.seen.add(name)
        exact = self._held.pop(name, None)
        if exact is None or exact.shape != x.shape:
            self._rerouted.add(name)
        else:
            self._running[name].add(exact, x)

    def errors(self) -> dict[str, TensorError]:
        """All figures."""
        found = {}
        for name in dict.fromkeys([*self._isolated, *self._running]):
            isolated, running = self._isolated.get(name), self._running.get(name)
            found[name] = TensorError(
                name,
                None if isolated is None else isolated.error(),
                None if running is None or name in self._rerouted else running.error(),
                self._expected.get(name),
            )
        return found

    def _named(self, name: str) -> tuple[str, TensorScale | None]:
        """The name of the first reader of the same tensor, and its entry in the scale file."""
        entry = self._readers.get(name)
        if entry is None:
            return name, None
        # an output stays apart from the input that it becomes: only the latter is rounded
        port = name.rpartition(":")[2].partition("#")[0]
        return self._first.setdefault((entry[0], port), name), entry[1]


def _is_of(quantizer: TensorQuantizer, tensor: TensorScale) -> bool:
    """Whether a quantizer is what a scale file says, so that the file's error is about it."""
    if tensor.scheme.dynamic:
        return not isinstance(quantizer, StaticQuantizer)
    if not isinstance(quantizer, StaticQuantizer):
        return False
    grid = quantizer.grid
    same = (grid.qmin, grid.qmax) == (tensor.qmin, tensor.qmax)
    return same and torch.equal(quantizer.scale.cpu(), torch.tensor(tensor.scale, dtype=torch.float32))


def _forward(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        if isinstance(batch, torch.Tensor):
            model(batch)
        else:
            model(**batch)


def _sqnr(error: MeasuredError | None) -> float:
    return float("inf") if error is None or error.sqnr_db is None else error.sqnr_db
