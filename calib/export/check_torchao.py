# SPDX-License-Identifier: Apache-2.0
"""Checks scales for torchao, and runs a model with them in torchao's integer layers."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calib.errors import UsageError
from calib.export.checks import checks, consumer
from calib.export.compare import first_output, largest_difference, paired_speed
from calib.export.compressed_tensors import weight_codes
from calib.export.linears import linear_ranges
from calib.export.report import ConsumerReport, Verification
from calib.export.table import check_against_ranges
from calib.export.torchao import apply_torchao, read_torchao
from calib.export.trial_inputs import trial_inputs
from calib.quantized import QuantizationPlan, QuantizedModel, QuantizedWeight
from calib.quantized.grid import IntegerGrid
from calib.quantized.quantizers import StaticQuantizer
from calib.schema.export import ExportManifest
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = ["check_torchao", "run_torchao"]

LAYER_ALLOWANCE = 2.0**-18
"""Of one layer, relative to its largest output. torchao multiplies the int32 sum by both scales one after the other."""
MODEL_ALLOWANCE = 0.05
"""Of the whole model: what codes that differ by one lead to."""


@checks("torchao")
def check_torchao(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every scale of `torchao_scales.json`."""
    found = Verification("torchao")
    held = {name: (scale, 0) for name, scale in read_torchao(folder).items()}
    if scales is None or manifest is None:
        return found
    ranges = linear_ranges(scales, fused=False).ranges
    wanted = {n: (ranges[n].symmetric_scale(127.5), 0) for n in manifest.quantized if n in ranges}
    return check_against_ranges(found, held, wanted)


@consumer("torchao", formats=("torchao",), packages=("torchao",), install="pip install 'calib[torchao]'")
def run_torchao(folder: Path, manifest: ExportManifest | None, model: OpenedModel | None) -> ConsumerReport:
    """Applies the scales to a copy of the model and compares layers, outputs and speed.

    Raises:
        UsageError: the model was not given; the format holds scales only.
    """
    if model is None:
        raise UsageError(f"{folder}: holds scales only; pass the model with --model to run them, or --no-run")
    scales = read_torchao(folder)
    # in float32, where the rounding of a sum is far below a step of the grid
    reference = model.model if model.provenance.dtype == "float32" else copy.deepcopy(model.model).float()
    integer = copy.deepcopy(reference)
    apply_torchao(integer, scales)
    grid = IntegerGrid(-128, 127, 127.5)
    plan = QuantizationPlan(
        inputs={name: StaticQuantizer(grid, torch.tensor(scale)) for name, scale in scales.items()},
        weights={name: _weight(integer.get_submodule(name), reference.get_submodule(name)) for name in scales},
    )
    inputs = trial_inputs(reference)
    exact, worst, read, kernels = 0, 0.0, 0, 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), QuantizedModel(reference, plan):
        for name, scale in scales.items():
            layer: Any = integer.get_submodule(name)
            x = torch.randn(1, 4, layer.in_features, generator=generator) * (scale * 60)
            difference = largest_difference(layer(x), reference.get_submodule(name)(x))
            exact, worst = exact + (difference <= LAYER_ALLOWANCE), max(worst, difference)
            held = getattr(layer.weight, "act_quant_scale", None)
            read += held is not None and float(held.reshape(-1)[0]) == scale
            kernels += getattr(layer.weight, "qdata", layer.weight).dtype == torch.int8
        ours = first_output(reference(**inputs))
    with torch.no_grad():
        theirs = first_output(integer(**inputs))
        ratios = paired_speed(lambda: reference(**inputs), lambda: integer(**inputs), pairs=7)
    return ConsumerReport(
        consumer=f"torchao {version('torchao')}",
        scales_read=read,
        scales=len(scales),
        layers_exact=exact,
        layers=len(scales),
        layer_difference=worst,
        model_difference=largest_difference(theirs, ours),
        allowance=MODEL_ALLOWANCE,
        integer_layers=kernels,
        speed=round(median(ratios), 3),
    )


def _weight(layer: Any, module: nn.Module) -> QuantizedWeight:
    """The codes that torchao made of a weight, if they are those of the format.

    It multiplies by the reciprocal of the scale, so that about one code in a thousand is the neighbour of ours. Where
    the difference is larger, or the scale another, ours are returned, for the comparison to fail.
    """
    codes, scale = weight_codes(module.get_parameter("weight").detach())
    theirs = layer.weight
    near = (theirs.qdata.int() - codes.int()).abs().max() <= 1
    if near and torch.equal(theirs.scale.reshape(-1), scale.reshape(-1)):
        return QuantizedWeight(theirs.qdata.detach(), scale)
    return QuantizedWeight(codes, scale)
