# SPDX-License-Identifier: Apache-2.0
"""Scales for torchao's static INT8 linear layers: a JSON file, and the function that applies it to a model.

torchao has no file of scales; a configuration takes the scale of each layer's input, float32 ``[1, 1, 1]``, and rounds
the weight itself, per row with amax / 127.5 on -128..127. The grid of inputs is its own too: amax / 127.5 is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import ArtifactError, UsageError
from calib.export.formats import register
from calib.export.linears import linear_ranges
from calib.export.request import ExportRequest, ExportSummary

__all__ = ["FILE", "apply_torchao", "export_torchao", "read_torchao"]

FILE = "torchao_scales.json"


@register(
    "torchao",
    summary="scale of every linear input, and calib.export.torchao.apply_torchao",
    carries="input scales (symmetric)",
    consumers=("torchao",),
    proven="torchao, executing integers",
    extra="torchao",
)
def export_torchao(request: ExportRequest) -> ExportSummary:
    """Writes `torchao_scales.json`.

    Raises:
        UsageError: the scales are not 8-bit and symmetric.
        ModelError: no layer has a scale.
    """
    if request.scales.bits != 8:
        raise UsageError(f"torchao: --bits {request.scales.bits} has no static configuration; only 8 has")
    model = None if request.model is None else request.model.model
    linears = linear_ranges(request.scales, model, fused=False)
    uneven = [name for name, found in linears.ranges.items() if not found.symmetric]
    if uneven:
        raise UsageError(
            f"torchao: {uneven[0]} has a zero point, which it does not take; choose scales with --symmetric"
        )
    content = {
        "format": "calib.torchao",
        "version": "1.0",
        "granularity": ["PerTensor", "PerRow"],
        "input_scales": {name: found.symmetric_scale(127.5) for name, found in linears.ranges.items()},
    }
    (request.folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return ExportSummary(list(linears.ranges), linears.in_float, [], list(linears.notes))


def read_torchao(folder: Path) -> dict[str, float]:
    """Scale of the input of each layer.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(scale) for name, scale in content["input_scales"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path}: is missing or damaged; export again") from None


def apply_torchao(model: nn.Module, scales: dict[str, float], *, dimensions: int = 3) -> None:
    """Turns linear layers of a model into torchao's static INT8 ones, in place.

    Args:
        model: the float model.
        scales: by module, see `read_torchao`.
        dimensions: of the inputs of these layers, ``[batch, tokens, channels]`` in transformers. torchao asks for a
            scale of as many, and stops at a pooler, a classifier or an expert, which read ``[rows, channels]``: a hook
            gives the scale the dimensions of what arrives.

    Raises:
        ArtifactError: the model has no such layer.
    """
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, scale in scales.items():
        if name not in layers:
            raise ArtifactError(f"{name}: the model has no such linear layer; apply scales to the model they are of")
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=torch.full((1,) * dimensions, scale, dtype=torch.float32),
            granularity=[PerTensor(), PerRow()],
        )
        quantize_(model, config, filter_fn=lambda module, _, wanted=layers[name]: module is wanted)
        layers[name].register_forward_pre_hook(_fit_scale)


def _fit_scale(module: Any, args: tuple[torch.Tensor, ...]) -> None:
    scale = module.weight.act_quant_scale
    if args and scale.ndim != args[0].ndim:
        module.weight.act_quant_scale = scale.reshape((1,) * args[0].ndim)
