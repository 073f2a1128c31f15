# SPDX-License-Identifier: Apache-2.0
"""The second moments of the inputs of linear layers, which error compensation weighs rounding errors by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from calib.errors import GateError, ModelError, UsageError
from calib.models.memory import available_bytes
from calib.quantized.plan import QuantizationPlan
from calib.quantized.positions import Positions
from calib.quantized.recent import Recent
from calib.quantized.rounding import gptq
from calib.quantized.weights import QuantizedWeight, WeightScheme, as_matrix
from calib.sites.structure import is_projection

__all__ = ["HessianSum", "collect_hessians", "compensated", "hessian_bytes"]


class HessianSum:
    """Sum of x x^T over the rows x that a layer has read.

    Args:
        inputs: of the layer.
        device: where sums live.
        dtype: of sums.
    """

    def __init__(self, inputs: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.total = torch.zeros(inputs, inputs, device=device, dtype=dtype)
        self.rows = 0

    def add(self, product: torch.Tensor, rows: int) -> None:
        """Adds ``X^T X`` of ``rows`` rows."""
        self.total += product
        self.rows += rows

    def mean(self) -> torch.Tensor:
        """Mean of x x^T, ``[inputs, inputs]``.

        Raises:
            GateError: nothing was read.
        """
        if not self.rows:
            raise GateError("hessian: no input was seen; run the model inside the context, on data that reaches it")
        return self.total / self.rows


@contextmanager
def collect_hessians(
    model: nn.Module, modules: Iterable[str], *, skip_positions: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, HessianSum]]:
    """Sums x x^T of the inputs of linear layers during ordinary forward passes.

    Memory: `hessian_bytes`. For large models collect block by block, each time with fewer modules.

    Args:
        model: the one that is run; its hooks are removed at the end, also after an exception.
        modules: names of linear layers or transformers' `Conv1D`.
        skip_positions: leave out the first n tokens of each row. Only where these are not computed with the rounded
            weights: attention sinks outweigh all others, and a weight compensated without them destroys them.
        dtype: of sums, float32 or float64; products are computed in it.

    Raises:
        UsageError: a module is missing, or is no linear layer.
        ModelError: the sums do not fit into memory.
    """
    modules = list(modules)
    _check_memory(model, modules, dtype)
    sums = {name: HessianSum(_inputs(model, name), _device(model, name), dtype) for name in modules}
    recent: Recent[tuple[torch.Tensor, int]] = Recent()
    positions = Positions(model, skip_positions)

    def product(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        _, rest = positions.split(x.detach())
        rows = rest.reshape(-1, rest.shape[-1]).to(dtype)
        return rows.T @ rows, rows.shape[0]

    with ExitStack() as stack:
        stack.enter_context(positions)
        stack.callback(positions.on_end(recent.forget))
        for name, held in sums.items():

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], held: HessianSum = held) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                held.add(*recent.of(x, sums, lambda: product(x)))

            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield sums


def hessian_bytes(model: nn.Module, modules: Iterable[str], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that `collect_hessians` holds: inputs squared, for each module."""
    return sum(_inputs(model, name) ** 2 for name in modules) * dtype.itemsize


def compensated(
    plan: QuantizationPlan, model: nn.Module, hessians: dict[str, HessianSum], **options: Any
) -> QuantizationPlan:
    """The plan with the weights of these modules rounded by `gptq`, all of them against the inputs as they were seen.

    Args:
        plan: holds the schemes.
        model: holds the weights; not inside of a `QuantizedModel`, which holds rounded ones.
        hessians: of modules in the plan.
        options: of `gptq`.

    Raises:
        UsageError: the plan does not round the weight of a module, or `gptq` refuses.
        GateError: a module has seen no input.
    """
    rounded: dict[str, WeightScheme | QuantizedWeight] = {}
    for name, hessian in hessians.items():
        scheme, module = plan.weights.get(name), model.get_submodule(name)
        if not isinstance(scheme, WeightScheme):
            raise UsageError(f"{name}: the plan has no scheme for its weight; plan it, or leave out its Hessian")
        matrix = as_matrix(module, module.get_parameter("weight").detach())
        rounded[name] = gptq(matrix, hessian.mean(), scheme, name=name, **options)
    return plan.with_weights(rounded)


def _check_memory(model: nn.Module, modules: list[str], dtype: torch.dtype) -> None:
    devices: dict[str, list[str]] = {}
    for name in modules:
        devices.setdefault(str(_device(model, name)), []).append(name)
    for device, names in devices.items():
        needed, available = hessian_bytes(model, names, dtype), available_bytes(device)
        if needed > available:
            raise ModelError(
                f"hessians of {len(names)} modules: they need {needed / 1e9:.1f} GB on {device}, "
                f"{available / 1e9:.1f} GB are available; collect fewer modules at a time"
            )


def _inputs(model: nn.Module, name: str) -> int:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"{name}: the model has no such module; `calib sites MODEL` lists all names") from None
    if not is_projection(module) or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise UsageError(f"{name}: a {type(module).__name__} is no linear layer, its inputs have no Hessian here")
    return as_matrix(module, module.get_parameter("weight")).shape[1]


def _device(model: nn.Module, name: str) -> torch.device:
    _inputs(model, name)  # refuses what has no weight matrix
    return model.get_submodule(name).get_parameter("weight").device
