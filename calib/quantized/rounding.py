# SPDX-License-Identifier: Apache-2.0
"""From a weight to its codes: each value to the nearest, or with the error of one column made good by the next ones.

`gptq` follows Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1: columns are rounded one after the other, and each rounding error is spread over the columns
that are left, so that the error of the layer's output, tr(E H E^T), stays small. Scales are those of the original
weight, also per group, so that any order of columns is possible.
"""

from __future__ import annotations

from typing import Literal

import torch

from calib.errors import UsageError
from calib.quantized.fake_quantize import round_float8
from calib.quantized.grid import dequantize, quantize
from calib.quantized.weights import QuantizedWeight, WeightScheme

__all__ = ["gptq", "round_to_nearest"]


def round_to_nearest(weight: torch.Tensor, scheme: WeightScheme, name: str = "weight") -> QuantizedWeight:
    """Rounds every value to the nearest code, ties to even.

    Args:
        weight: floating point ``[outputs, inputs]``.
        scheme: its grid.
        name: for errors.

    Raises:
        UsageError: the group size does not divide the inputs.
    """
    grouped = scheme.grouped(weight.detach(), name)
    scale, point = scheme.step(grouped)
    codes = _codes(grouped, scale, point, scheme).flatten(1)
    return QuantizedWeight(codes, scale.squeeze(-1), None if point is None else point.squeeze(-1))


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    *,
    damping: float = 0.01,
    order: Literal["fixed", "activation"] = "fixed",
    block_size: int = 128,
    name: str = "weight",
) -> QuantizedWeight:
    """Rounds column by column and makes good the error, see the module. Arithmetic: float32, factors from float64.

    Args:
        weight: floating point ``[outputs, inputs]``.
        hessian: floating point ``[inputs, inputs]``: the mean, or the sum, of x x^T over inputs x (`HessianSum`).
        scheme: its grid.
        damping: added to the diagonal, as a share of its mean (0.01 in the paper).
        order: ``activation``: inputs with a large diagonal first, while many others are left to make good their error.
        block_size: columns between two updates of all that is left; changes speed, not the result.
        name: for errors.

    An input that was 0 on all data constrains nothing: its column is rounded to the nearest.

    Raises:
        UsageError: shapes do not fit, the group size does not divide the inputs, or the Hessian is not positive
            definite.
    """
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs):
        raise UsageError(f"{name}: a Hessian {list(hessian.shape)} for {inputs} inputs; collect it on this layer")
    grouped = scheme.grouped(weight.detach(), name)
    scale, point = scheme.step(grouped)
    diagonal = hessian.diagonal()
    columns = torch.arange(inputs, device=weight.device)
    if order == "activation":
        columns = torch.argsort(diagonal.to(weight.device), descending=True, stable=True)
    elif order != "fixed":
        raise UsageError(f"order {order!r}: unknown; choose fixed or activation")
    factor = _inverse_factor(hessian.to(weight.device)[columns][:, columns], damping, name)
    # transposed: a column of the weight is a contiguous row here, and the groups' numbers lie beside it
    left = weight.detach().float()[:, columns].T.contiguous()
    group = columns // grouped.shape[2]
    steps = scale.squeeze(-1).T.contiguous()
    points = None if point is None else point.squeeze(-1).T.contiguous()
    codes = torch.empty(left.shape, dtype=_code_dtype(scheme), device=weight.device)
    for start in range(0, inputs, block_size):
        stop = min(start + block_size, inputs)
        errors = torch.empty_like(left[start:stop])
        for i, of_group in zip(range(start, stop), group[start:stop].tolist(), strict=True):
            zero = None if points is None else points[of_group]
            codes[i] = _codes(left[i], steps[of_group], zero, scheme)
            error = (left[i] - dequantize(codes[i], steps[of_group], zero)) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    unsorted = torch.empty_like(codes)
    unsorted[columns] = codes
    return QuantizedWeight(unsorted.T.contiguous(), scale.squeeze(-1), None if point is None else point.squeeze(-1))


def _code_dtype(scheme: WeightScheme) -> torch.dtype:
    if scheme.grid is None:
        return torch.float8_e4m3fn
    return torch.int8 if scheme.grid.qmin >= -128 and scheme.grid.qmax <= 127 else torch.int16


def _codes(values: torch.Tensor, scale: torch.Tensor, point: torch.Tensor | None, scheme: WeightScheme) -> torch.Tensor:
    grid = scheme.grid
    if grid is None:
        return round_float8(values.float() / scale)
    codes = quantize(values, scale, point, grid.qmin, grid.qmax, zero_point_first=grid.zero_point_first)
    return codes.to(_code_dtype(scheme))


def _inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    damped = damped + torch.diag(damping * diagonal.mean() + dead.double())
    lower, failed = torch.linalg.cholesky_ex(damped)
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed.item() or failed_again.item() or not upper.isfinite().all():
        raise UsageError(
            f"{name}: its Hessian is not positive definite with damping {damping}; raise damping, or collect more data"
        )
    factor: torch.Tensor = upper.float()
    return factor
