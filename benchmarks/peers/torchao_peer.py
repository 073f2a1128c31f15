# SPDX-License-Identifier: Apache-2.0
"""torchao's SmoothQuant over static INT8, run by its own INT8 kernels: a scale per activation tensor and weight row."""

from __future__ import annotations

import sys
from typing import Any

import torch
from nll import run


def quantize(model: Any, blocks: list[list[int]], settings: dict[str, Any]) -> Any:
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_
    from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and name != "lm_head"

    base = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
    with torch.no_grad():
        quantize_(model, SmoothQuantConfig(base, QuantizationStep.PREPARE, settings["alpha"]), chosen)
        for block in blocks:
            model(input_ids=torch.tensor([block]))
        quantize_(model, SmoothQuantConfig(base, QuantizationStep.CONVERT, settings["alpha"]), _observed)
    return model


def _observed(module: torch.nn.Module, name: str) -> bool:
    from torchao.prototype.smoothquant.core import SmoothQuantObservedLinear

    return isinstance(module, SmoothQuantObservedLinear)


if __name__ == "__main__":
    run("torchao", sys.argv[1:], quantize)
