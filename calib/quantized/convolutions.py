# SPDX-License-Identifier: Apache-2.0
"""Error compensation for convolutions: a convolution is a linear layer of its patches, one for each group of channels.

Each output row of `as_matrix` reads the patches of its own group, so each group has a Hessian of its own: one of
``kernel`` squared values per channel for a depthwise convolution, one of all channels for a pointwise one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from calib.errors import GateError, UsageError
from calib.quantized.plan import QuantizationPlan
from calib.quantized.rounding import gptq
from calib.quantized.weights import QuantizedWeight, WeightScheme, as_matrix

__all__ = ["collect_patch_hessians", "compensated_convolutions"]


@contextmanager
def collect_patch_hessians(model: nn.Module, modules: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums x x^T over the patches x that two-dimensional convolutions read during ordinary forward passes.

    What counts is what the convolution itself is called with: padding that a module adds before is part of it.

    Args:
        model: the one that is run.
        modules: names of `nn.Conv2d`.

    Yields:
        By module, once it was reached: float32 ``[groups, inputs, inputs]`` with ``inputs`` the columns of its weight.

    Raises:
        UsageError: a module is missing or is no `nn.Conv2d`.
    """
    names: dict[int, str] = {}
    for name in modules:
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, nn.Conv2d):
            kind = "no module" if module is None else f"a {type(module).__name__}"
            raise UsageError(f"{name}: is {kind}; name convolutions in two dimensions")
        names[id(module.weight)] = name
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad(), _Patches(names, sums):
        yield sums


def compensated_convolutions(
    plan: QuantizationPlan, model: nn.Module, hessians: Mapping[str, torch.Tensor], **options: Any
) -> QuantizationPlan:
    """The plan with the weights of these convolutions rounded by `gptq`, group by group, with their planned scales.

    Args:
        plan: holds the schemes, one scale per row or per tensor.
        model: holds the weights; not inside of a `QuantizedModel`.
        hessians: of `collect_patch_hessians`.
        options: of `gptq`.

    Raises:
        UsageError: the plan has no scheme for a weight, or `gptq` refuses.
        GateError: nothing was collected.
    """
    if not hessians:
        raise GateError("patches: no convolution was reached; run the model inside the context")
    rounded: dict[str, WeightScheme | QuantizedWeight] = {}
    for name, hessian in hessians.items():
        scheme, module = plan.weights.get(name), model.get_submodule(name)
        if not isinstance(scheme, WeightScheme):
            raise UsageError(f"{name}: the plan has no scheme for its weight; plan it, or leave out its Hessian")
        matrix = as_matrix(module, module.get_parameter("weight").detach())
        rows = len(matrix) // len(hessian)
        scale, point = (None if x is None else x.flatten() for x in scheme.step(scheme.grouped(matrix, name)))
        parts = []
        for group, one in enumerate(hessian):
            window = slice(group * rows, (group + 1) * rows)
            of_rows = dataclasses.replace(scheme, scale=_of(scale, window), zero_point=_of(point, window))
            parts.append(gptq(matrix[window], one, of_rows, name=name, **options))
        rounded[name] = QuantizedWeight(
            torch.cat([part.codes for part in parts]),
            parts[0].scale if scale is not None and len(scale) == 1 else torch.cat([part.scale for part in parts]),
            None if point is None else point.reshape(-1, 1),
        )
    return plan.with_weights(rounded)


def _of(numbers: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Those of some rows; a single one is for all."""
    return numbers if numbers is None or len(numbers) == 1 else numbers[rows]


class _Patches(TorchFunctionMode):
    """Sees every call of `conv2d`, with the padding that it is called with; knows modules by their weight."""

    def __init__(self, names: Mapping[int, str], sums: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names, self._sums = names, sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        name = self._names.get(id(weight))
        if name is None:
            return
        if isinstance(padding, str):
            raise UsageError(f"{name}: padding {padding!r} is not supported here; give it as numbers")
        x = input.detach().float()
        x = x if x.ndim == 4 else x.unsqueeze(0)
        patches = nn.functional.unfold(x, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
        patches = patches.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)  # [groups, inputs, patches]
        product = patches @ patches.transpose(1, 2)
        self._sums[name] = self._sums[name] + product if name in self._sums else product
