# SPDX-License-Identifier: Apache-2.0
"""`Watch`: a context that reports every planned tensor of a forward pass, as the next operation reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from calib.quantized.model import QuantizedModel
from calib.quantized.plan import QuantizationPlan
from calib.quantized.positions import Positions
from calib.quantized.quantizers import TensorQuantizer
from calib.sites.attention import transform_attention

__all__ = ["Watch"]

Report = Callable[[str, TensorQuantizer | None, torch.Tensor], None]


class Watch:
    """For one forward pass: inputs and outputs of planned modules, keys and values, without positions left in float.

    Args:
        model: any module.
        plan: names the tensors.
        report: called with the name (``module:input``, ``module:output``, ``module:key``; ``#1`` for a second call),
            the quantizer that the plan has for it, and the tensor.
        quantized: opened with this context, such that rounded tensors are seen.
    """

    def __init__(
        self, model: nn.Module, plan: QuantizationPlan, report: Report, *, quantized: QuantizedModel | None = None
    ) -> None:
        self._model, self._plan, self._report, self._quantized = model, plan, report, quantized
        self._inputs, self._outputs = _by_module(plan.inputs), _by_module(plan.outputs)
        self._positions = Positions(model, plan.skip_positions)
        self._calls: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._enter()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _enter(self) -> None:
        modules = dict(self._model.named_modules())
        # around attention ours comes first, so that it is the inner one and sees what was rounded; hooks run in order
        transforms = {id(modules[name]): self._on_attention(name, p) for name, p in self._plan.attention.items()}
        self._stack.enter_context(transform_attention(transforms))
        if self._quantized is not None:
            self._stack.enter_context(self._quantized)
        self._stack.enter_context(self._positions)
        for name in dict.fromkeys([*self._inputs, *self._outputs, *self._plan.weights]):
            module = modules[name]
            self._stack.callback(module.register_forward_pre_hook(self._on_input(name), with_kwargs=True).remove)
            self._stack.callback(module.register_forward_hook(self._on_output(name)).remove)

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = args[:1] or [value for value in kwargs.values() if isinstance(value, torch.Tensor)][:1]
            for x in tensors:
                self._send(*self._next(f"{name}:input", self._inputs.get(name, [])), x)

        return hook

    def _on_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._send(*self._next(f"{name}:output", self._outputs.get(name, [])), output)

        return hook

    def _on_attention(
        self, name: str, parts: Mapping[str, TensorQuantizer]
    ) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def transform(part: str, x: torch.Tensor) -> torch.Tensor:
            if part in parts:
                self._send(f"{name}:{part}", parts[part], x)
            return x

        return transform

    def _next(self, port: str, quantizers: list[TensorQuantizer]) -> tuple[str, TensorQuantizer | None]:
        """Name and quantizer of this call. Further calls on one scale are told apart, each has its own float tensor."""
        call = self._calls[port]
        self._calls[port] += 1
        name = f"{port}#{call}" if call or len(quantizers) > 1 else port
        return name, quantizers[min(call, len(quantizers) - 1)] if quantizers else None

    def _send(self, name: str, quantizer: TensorQuantizer | None, x: Any) -> None:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            self._report(name, quantizer, self._positions.split(x)[1])


def _by_module(quantizers: Mapping[str, TensorQuantizer]) -> dict[str, list[TensorQuantizer]]:
    """Quantizers per module, in the order of its calls."""
    found: dict[str, list[TensorQuantizer]] = {}
    for name in sorted(quantizers, key=lambda n: int(n.partition("#")[2] or 0)):
        found.setdefault(name.partition("#")[0], []).append(quantizers[name])
    return found
