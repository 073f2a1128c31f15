# SPDX-License-Identifier: Apache-2.0
"""`IntegerLinear`: a linear layer written so that its ONNX graph is what runtimes multiply in integers."""

from __future__ import annotations

import numpy as np
import torch
import torch.ao.quantization.fx  # registers the operators that torch exports as Q/DQ
from torch import Tensor, nn

from calib.errors import ModelError
from calib.export.linears import LinearRange
from calib.export.onnx_qdq import weight_grid

__all__ = ["IntegerLinear"]

_OPS = torch.ops.quantized_decomposed
_INT8, _INT32 = (-128, 127, torch.int8), (-(2**31), 2**31 - 1, torch.int32)
_LARGEST_BIAS = 2**31 - 2**20  # an int32 sum must still fit above it


class IntegerLinear(nn.Module):
    """Q/DQ of the input, of two dimensions, weight in int8 per output row, bias in int32: `QGemm` of ONNX Runtime.

    The form and its reasons are those of `calib.export.onnx_qdq`; that exporter is for models of token ids.

    Args:
        layer: in float.
        wanted: range of its input, and the scales of its weight.

    Raises:
        ModelError: the range is next to 0, or the bias does not fit into an int32 of the scale of the products.
    """

    weight_quantized: Tensor
    weight_scale: Tensor
    zeros: Tensor
    bias_quantized: Tensor | None
    bias_scale: Tensor

    def __init__(self, layer: nn.Linear, wanted: LinearRange) -> None:
        super().__init__()
        weight = layer.weight.detach().float().cpu()
        self.scale, self.zero_point = wanted.grid()
        step = torch.from_numpy(weight_grid(np.ascontiguousarray(weight.numpy().T), wanted))
        self.register_buffer("weight_quantized", (weight / step[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("weight_scale", step)
        self.register_buffer("zeros", torch.zeros(len(step), dtype=torch.long))
        self.register_buffer("bias_scale", step * self.scale)
        codes = None
        if layer.bias is not None:
            whole = (layer.bias.detach().double().cpu() / self.bias_scale.double()).round()
            if not bool((whole.abs() < _LARGEST_BIAS).all()):
                raise ModelError(f"{wanted.module}: its bias is too large for an int32 of the scale of its products")
            codes = whole.to(torch.int32)
        self.register_buffer("bias_quantized", codes)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        grid = (self.scale, self.zero_point, *_INT8)
        rows = x.reshape(-1, x.shape[-1])
        rows = _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(rows, *grid), *grid)
        weight = _OPS.dequantize_per_channel(self.weight_quantized, self.weight_scale, self.zeros, 0, *_INT8)
        bias = None
        if self.bias_quantized is not None:
            bias = _OPS.dequantize_per_channel(self.bias_quantized, self.bias_scale, self.zeros, 0, *_INT32)
        return nn.functional.linear(rows, weight, bias).reshape(*x.shape[:-1], -1)
