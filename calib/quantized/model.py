# SPDX-License-Identifier: Apache-2.0
"""`QuantizedModel`: a context in which a model computes as its quantized deployment would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn

from calib.errors import ModelError, UsageError
from calib.quantized.int8 import Int8Input, Int8Linear, why_not_int8
from calib.quantized.plan import QuantizationPlan
from calib.quantized.positions import Positions
from calib.quantized.quantizers import IntegerQuantizer, TensorQuantizer
from calib.quantized.recent import Recent
from calib.quantized.rounding import round_to_nearest
from calib.quantized.weights import QuantizedWeight, WeightScheme, as_matrix, from_matrix, is_linear
from calib.sites.attention import transform_attention

__all__ = ["QuantizedModel"]


class QuantizedModel:
    """Rounds weights once, and activations as they pass; everything is as before when the context ends.

    ::

        with QuantizedModel(model, plan) as quantized:
            logits = model(input_ids).logits
        assert not quantized.silent()

    On entry each planned weight is replaced by a rounded copy (the model then needs the memory of both); on exit, also
    after an exception, the module holds its own parameter again, the very same object. An embedding that shares the
    parameter never sees the copy. A tensor that several modules read, such as the input of q, k and v, is rounded once.
    Scales and rounding are float32; the rounded tensor has the dtype that the model computes in.

    Args:
        model: any module.
        plan: what to round, see `plan_from_scales`.
        mode: ``fake`` multiplies rounded values in the model's dtype; ``int8`` multiplies the same codes in int8 and
            adds in int32 (`Int8Linear`), where a module's weight and input allow it.
        trainable: weights are rounded anew in each forward pass with a straight-through gradient to the model's own
            parameters, so that an optimizer can train them.

    Attributes:
        not_int8: in mode ``int8``, modules that are computed as in mode ``fake`` -> the reason.

    Raises:
        UsageError: the plan names a module that the model lacks or a weight that does not fit, or the context was
            entered twice.
        ModelError: a weight is not in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: QuantizationPlan,
        *,
        mode: Literal["fake", "int8"] = "fake",
        trainable: bool = False,
    ) -> None:
        if mode not in ("fake", "int8"):
            raise UsageError(f"mode {mode!r}: unknown; choose fake or int8")
        if mode == "int8" and trainable:
            raise UsageError("mode int8: codes have no gradient; train in mode fake")
        self.model, self.plan, self.mode, self.trainable = model, plan, mode, trainable
        self._modules = dict(model.named_modules())
        named = {n.partition("#")[0] for n in [*plan.inputs, *plan.outputs]} | {*plan.weights, *plan.attention}
        for name in sorted(named):
            if name not in self._modules:
                raise UsageError(f"{name}: the plan names it and the model has no such module; plan for this model")
        self.not_int8 = self._kept_from_int8() if mode == "int8" else {}
        self._stack = ExitStack()
        self._entered = False
        self._positions = Positions(model, plan.skip_positions)
        self._calls: Counter[str] = Counter()
        self._fired: set[str] = set()
        self._placed: dict[tuple[int, torch.device], TensorQuantizer] = {}
        self._rounded: Recent[torch.Tensor] = Recent()
        self._codes: Recent[Int8Input] = Recent()

    def __enter__(self) -> Self:
        if self._entered:
            raise UsageError("quantized model: its context is open already; make another QuantizedModel to nest them")
        self._entered = True
        try:
            self._enter()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def silent(self) -> list[str]:
        """Names of planned modules that no forward pass has reached: their inputs or outputs were not rounded."""
        planned = [name.partition("#")[0] for name in [*self.plan.inputs, *self.plan.outputs]]
        planned += [f"{name}:{part}" for name, parts in self.plan.attention.items() for part in parts]
        return sorted(set(planned) - self._fired)

    def _kept_from_int8(self) -> dict[str, str]:
        """Planned modules that mode `int8` computes as mode `fake` does, and why."""
        inputs = _by_module(self.plan.inputs)
        found = {}
        for name in dict.fromkeys([*inputs, *self.plan.weights]):
            why = why_not_int8(self._modules[name], self.plan.weights.get(name), inputs.get(name, []))
            if why is not None:
                found[name] = why
        return found

    def _close(self) -> None:
        self._stack.close()
        self._entered = False
        self._end_of_pass()

    def _enter(self) -> None:
        self._stack.enter_context(self._positions)
        self._stack.callback(self._positions.on_end(self._end_of_pass))
        inputs = _by_module(self.plan.inputs)
        for name, weight in self.plan.weights.items():
            own = _weight(name, self._modules[name])
            if self.trainable:
                self._round_in_each_pass(name, weight)
                self._own_weight_at_first(name, own)
                continue
            codes = self._swap(name, weight, own)
            if self.mode == "int8" and name not in self.not_int8:
                self._compute_in_int8(name, codes, own, inputs.pop(name))
            else:
                self._own_weight_at_first(name, own)
        for name, quantizers in inputs.items():
            hook = self._modules[name].register_forward_pre_hook(self._on_input(name, quantizers), with_kwargs=True)
            self._stack.callback(hook.remove)
        for name, quantizers in _by_module(self.plan.outputs).items():
            self._stack.callback(self._modules[name].register_forward_hook(self._on_output(name, quantizers)).remove)

        transforms = {id(self._modules[n]): self._on_attention(n, parts) for n, parts in self.plan.attention.items()}
        self._stack.enter_context(transform_attention(transforms))

    def _swap(self, name: str, weight: WeightScheme | QuantizedWeight, own: nn.Parameter) -> QuantizedWeight:
        """Puts a rounded parameter in the place of a module's own."""
        module = self._modules[name]
        codes = _rounded(name, module, weight)
        rounded = from_matrix(module, codes.dequantize(), own)
        module._parameters["weight"] = nn.Parameter(rounded, requires_grad=False)
        self._stack.callback(module._parameters.__setitem__, "weight", own)
        return codes

    def _compute_in_int8(
        self, name: str, codes: QuantizedWeight, own: nn.Parameter, quantizers: list[TensorQuantizer]
    ) -> None:
        """Has a module multiply codes, but with its own weight the positions that stay in float."""
        module = self._modules[name]
        linear = Int8Linear(module, codes)
        previous = module.__dict__.get("forward")

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            (x,) = [*args, *kwargs.values()]
            self._fired.add(name)
            quantizer = self._place(self._next(f"{name}:input", quantizers), x.device)
            assert isinstance(quantizer, IntegerQuantizer)

            def product(part: torch.Tensor) -> torch.Tensor:
                return linear(self._codes.of(part, quantizer, lambda: Int8Input.of(part, quantizer)), part.dtype)

            return self._positions.apply(x, product, in_float=lambda first: _multiply(module, own, first))

        module.__dict__["forward"] = forward
        if previous is None:
            self._stack.callback(module.__dict__.pop, "forward")
        else:
            self._stack.callback(module.__dict__.__setitem__, "forward", previous)

    def _round_in_each_pass(self, name: str, weight: WeightScheme | QuantizedWeight) -> None:
        """While a module runs, its attribute `weight` is the rounded one; its parameter stays what an optimizer has."""
        if isinstance(weight, QuantizedWeight):
            raise UsageError(f"{name}: codes that are fixed cannot be trained; plan a WeightScheme")
        module = self._modules[name]

        def before(module: nn.Module, args: Any) -> None:
            own = module._parameters["weight"]
            assert own is not None
            module.__dict__["weight"] = from_matrix(module, weight.fake(as_matrix(module, own)), own)

        def after(module: nn.Module, *_: Any) -> None:
            module.__dict__.pop("weight", None)

        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)):
            self._stack.callback(handle.remove)
        self._stack.callback(after, module)

    def _own_weight_at_first(self, name: str, own: nn.Parameter) -> None:
        """Has a linear layer multiply the positions that stay in float with its own weight."""
        module = self._modules[name]
        if not self.plan.skip_positions or not is_linear(module):
            return

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
            (x,) = [*args, *kwargs.values()]
            first, _ = self._positions.split(x)
            if first is None:
                return None
            in_float = _multiply(module, own, first)
            return self._positions.apply(output, lambda rest: rest, in_float=lambda _: in_float)

        self._stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _on_input(self, name: str, quantizers: list[TensorQuantizer]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            quantizer = self._next(f"{name}:input", quantizers)
            if args:
                return (self._round(args[0], quantizer, name), *args[1:]), kwargs
            for key, value in kwargs.items():
                if isinstance(value, torch.Tensor):
                    return args, {**kwargs, key: self._round(value, quantizer, name)}
            return None

        return hook

    def _on_output(self, name: str, quantizers: list[TensorQuantizer]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                raise UsageError(f"{name}: its output is no tensor, it cannot be rounded; plan a module inside it")
            return self._round(output, self._next(f"{name}:output", quantizers), name)

        return hook

    def _on_attention(self, name: str, parts: Mapping[str, TensorQuantizer]) -> Callable[[str, torch.Tensor], Any]:
        def transform(part: str, tensor: torch.Tensor) -> torch.Tensor:
            if part not in parts:
                return tensor
            self._fired.add(f"{name}:{part}")
            quantizer = self._place(parts[part], tensor.device)
            return self._positions.apply(tensor, quantizer, with_past=part != "query")

        return transform

    def _next(self, place: str, quantizers: list[TensorQuantizer]) -> TensorQuantizer:
        """The quantizer of this call in the running pass; a call more than there are scales for takes the last."""
        call = self._calls[place]
        self._calls[place] += 1
        return quantizers[min(call, len(quantizers) - 1)]

    def _round(self, x: Any, quantizer: TensorQuantizer, name: str) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        self._fired.add(name)
        return self._rounded.of(x, quantizer, lambda: self._positions.apply(x, self._place(quantizer, x.device)))

    def _place(self, quantizer: TensorQuantizer, device: torch.device) -> TensorQuantizer:
        key = (id(quantizer), device)
        if key not in self._placed:
            self._placed[key] = quantizer.to(device)
        return self._placed[key]

    def _end_of_pass(self) -> None:
        self._calls.clear()
        self._rounded.forget()
        self._codes.forget()


def _by_module(quantizers: Any) -> dict[str, list[TensorQuantizer]]:
    """Quantizers per module, in the order of its calls."""
    found: dict[str, dict[int, TensorQuantizer]] = {}
    for name, quantizer in quantizers.items():
        module, _, call = name.partition("#")
        found.setdefault(module, {})[int(call or 0)] = quantizer
    return {module: [calls[i] for i in sorted(calls)] for module, calls in found.items()}


def _weight(name: str, module: nn.Module) -> nn.Parameter:
    own = module._parameters.get("weight")
    if own is None:
        raise UsageError(f"{name}: it has no parameter `weight` to round; leave it out of the plan")
    if own.is_meta:
        raise ModelError(f"{name}: its weight is not in memory; load the model without offloading")
    return own


def _multiply(module: nn.Module, weight: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer computes with another weight."""
    module.__dict__["weight"] = weight  # goes before the parameter of this name
    try:
        product: torch.Tensor = type(module).forward(module, x.contiguous())  # Conv1D takes views of it
    finally:
        del module.__dict__["weight"]
    return product


def _rounded(name: str, module: nn.Module, weight: WeightScheme | QuantizedWeight) -> QuantizedWeight:
    own = _weight(name, module)
    matrix = as_matrix(module, own.detach())
    codes = weight if isinstance(weight, QuantizedWeight) else round_to_nearest(matrix, weight, name)
    if codes.codes.shape != matrix.shape:
        raise UsageError(
            f"{name}: codes {list(codes.codes.shape)} for a weight {list(matrix.shape)}; round this model's weights"
        )
    return codes
