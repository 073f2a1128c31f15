# SPDX-License-Identifier: Apache-2.0
"""`QuantizationAware`: a student whose passes in training are those of its quantized deployment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.quantized.settings import FakeQuantization
from calib.distill.quantized.steps import SMALLEST_STEP, PactQuantizer, learned_activation, learned_weight, start_of
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, WeightScheme, plan_from_scales
from calib.quantized.quantizers import DynamicQuantizer, StaticQuantizer, TensorQuantizer
from calib.quantized.weights import QuantizedWeight, as_matrix
from calib.sites.port import Axes

__all__ = ["QuantizationAware"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class QuantizationAware(nn.Module):
    """Steps of a model's tensors, as parameters, and the switch that rounds with them.

    What `plan_from_scales` quantizes is quantized: linear layers and convolutions, not the output head of a language
    model. A tensor that several modules read (the input of q, k and v) has one step. The model itself is no part of
    this module: its parameters stay where they are.

    Args:
        model: the student, on its device.
        settings: bits and kinds of steps.
        run: makes one forward pass without gradients; shows who reads which tensor, and sizes.

    Raises:
        ModelError: the model has nothing to quantize.
    """

    def __init__(self, model: nn.Module, settings: FakeQuantization, run: Callable[[], Any]) -> None:
        super().__init__()
        self.settings = settings
        self._held = [model]  # in a list, so that it is no submodule
        self._stack = ExitStack()
        self.active = False
        self._modules_named = dict(model.named_modules())
        self._names = list(plan_from_scales(model, inputs="none").weights)
        self._readers, self._sizes = self._probe(run)
        tensors = len(set(self._readers.values()))
        learns = settings.activation_bits is not None and settings.step != "absmax"
        device = next(model.parameters()).device
        self.activation_steps = nn.ParameterList(
            nn.Parameter(torch.ones((), device=device)) for _ in range(tensors if learns else 0)
        )
        rows = [as_matrix(module, module.weight).shape[0] for module in self._projections()]
        learns = settings.weight_bits is not None and settings.weight_step == "lsq"
        self.weight_steps = nn.ParameterList(
            nn.Parameter(torch.ones(count, device=device)) for count in (rows if learns else [])
        )

    @property
    def decayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay is part of the method for: the clips of PACT."""
        return list(self.activation_steps) if self.settings.step == "pact" else []

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay would pull away from what they learn: steps."""
        return [*([] if self.settings.step == "pact" else self.activation_steps), *self.weight_steps]

    def begin(self, run: Callable[[], Any]) -> None:
        """Sets first steps from one batch, and rounds from now on.

        Args:
            run: a forward pass in float.
        """
        seen: dict[int, Tensor] = {}
        with self._watching(lambda name, x: seen.setdefault(self._readers[name], x)):
            run()
        with torch.no_grad():
            for number, step in enumerate(self.activation_steps):
                first = start_of(seen[number].reshape(1, -1), self._grid("activations").qmax)[0]
                step.copy_(first * self._grid("activations").qmax if self.settings.step == "pact" else first)
            for module, step in zip(self._projections(), self.weight_steps, strict=len(self.weight_steps) > 0):
                step.copy_(start_of(as_matrix(module, module.weight), self._grid("weights").qmax))
        self.switch_on()

    def switch_on(self) -> None:
        """Rounds from now on, with the steps as they are."""
        if not self.active:
            self._stack.enter_context(QuantizedModel(self._held[0], self._plan(), trainable=True))
            self.active = True

    def switch_off(self) -> None:
        """The model computes in float again."""
        self._stack.close()
        self.active = False

    def settle(self) -> None:
        """After each step of the optimiser: no step of a grid is 0 or negative."""
        with torch.no_grad():
            for step in self.parameters():
                step.clamp_(min=SMALLEST_STEP)

    def learned_plan(self) -> QuantizationPlan:
        """The plan that the student was trained for, its steps frozen; PACT's clips as the steps that they are."""
        plan = self._plan()
        inputs: dict[str, TensorQuantizer] = {}
        for name, quantizer in plan.inputs.items():
            if isinstance(quantizer, PactQuantizer):
                scale = (quantizer.clip / quantizer.grid.qmax).detach().clone()
                inputs[name] = StaticQuantizer(quantizer.grid, scale, None, self._axes(name))
            elif isinstance(quantizer, StaticQuantizer):
                inputs[name] = dataclasses.replace(quantizer, scale=quantizer.scale.detach().clone())
            else:
                inputs[name] = quantizer
        weights: dict[str, WeightScheme | QuantizedWeight] = {}
        for name, scheme in plan.weights.items():
            assert isinstance(scheme, WeightScheme)
            fixed = None if scheme.scale is None else scheme.scale.detach().clone()
            weights[name] = dataclasses.replace(scheme, scale=fixed)
        return dataclasses.replace(plan, inputs=inputs, weights=weights)

    def _plan(self) -> QuantizationPlan:
        settings = self.settings
        inputs: dict[str, TensorQuantizer] = {}
        if settings.activation_bits is not None:
            made: dict[int, TensorQuantizer] = {}
            for name, number in self._readers.items():
                if number not in made:
                    made[number] = self._activation(number, name)
                inputs[name] = made[number]
        weights: dict[str, WeightScheme | QuantizedWeight] = {}
        if settings.weight_bits is not None:
            grid = self._grid("weights")
            for number, (name, module) in enumerate(zip(self._names, self._projections(), strict=True)):
                width = as_matrix(module, module.weight).shape[1]
                learned = bool(self.weight_steps)
                weights[name] = (
                    learned_weight(grid, self.weight_steps[number], width) if learned else WeightScheme(grid)
                )
        return QuantizationPlan(inputs=inputs, weights=weights)

    def _activation(self, number: int, name: str) -> TensorQuantizer:
        grid = self._grid("activations")
        if self.settings.step == "absmax":
            return DynamicQuantizer(grid, "per-tensor")
        step = self.activation_steps[number]
        if self.settings.step == "pact":
            return PactQuantizer(grid, step)
        return learned_activation(grid, step, self._sizes[number], self._axes(name))

    def _axes(self, name: str) -> Axes:
        return "channels_first" if isinstance(self._modules_named[name], _CONVOLUTIONS) else "tokens"

    def _grid(self, what: str) -> IntegerGrid:
        bits = self.settings.weight_bits if what == "weights" else self.settings.activation_bits
        assert bits is not None
        return IntegerGrid.of(bits)

    def _projections(self) -> list[Any]:
        return [self._modules_named[name] for name in self._names]

    def _probe(self, run: Callable[[], Any]) -> tuple[dict[str, int], list[int]]:
        """Which tensor each module reads, by number, and how many values of one sample each has."""
        numbers: dict[int, int] = {}
        alive: list[Tensor] = []  # an id is a tensor's own only while it lives
        readers: dict[str, int] = {}
        sizes: list[int] = []

        def see(name: str, x: Tensor) -> None:
            if id(x) not in numbers:
                numbers[id(x)] = len(sizes)
                sizes.append(max(1, x[0].numel()))
                alive.append(x)
            readers.setdefault(name, numbers[id(x)])

        with self._watching(see):
            run()
        used = {number: place for place, number in enumerate(sorted(set(readers.values())))}
        return {name: used[number] for name, number in readers.items()}, [sizes[number] for number in used]

    def _watching(self, see: Callable[[str, Tensor], Any]) -> ExitStack:
        """Calls `see` with the name and the input of each module of the plan, as long as the stack is open."""
        stack = ExitStack()

        def hook(name: str) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Any, ...]) -> None:
                see(name, args[0])

            return before

        for name in self._names:
            stack.callback(self._modules_named[name].register_forward_pre_hook(hook(name)).remove)
        return stack
