# SPDX-License-Identifier: Apache-2.0
"""A quantization plan from the numbers of an exported file: what its consumer must compute, computed by calib.

The plan takes codes and scales as they are stored, so it needs neither the scale file nor the float weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from calib.errors import ArtifactError
from calib.export.read_compressed_tensors import SUFFIXES, CompressedCheckpoint, CompressedLinear
from calib.export.safetensors_folder import SafetensorsFolder
from calib.models.transforms import apply_online_transforms
from calib.quantized.grid import IntegerGrid
from calib.quantized.plan import QuantizationPlan
from calib.quantized.quantizers import Float8Quantizer, StaticQuantizer, TensorQuantizer
from calib.quantized.weights import QuantizedWeight

__all__ = ["compressed_tensors_plan", "compute_transforms", "float_model"]


def compressed_tensors_plan(read: CompressedCheckpoint) -> QuantizationPlan:
    """Inputs, weights, keys and values as a checkpoint stores them."""
    return QuantizationPlan(
        inputs={name: _input(read, linear) for name, linear in read.linears.items()},
        weights={name: QuantizedWeight(linear.codes, linear.weight_scale) for name, linear in read.linears.items()},
        attention={
            name: {"key": _of_heads(key), "value": _of_heads(value)} for name, (key, value) in sorted(read.kv.items())
        },
    )


def float_model(read: CompressedCheckpoint) -> nn.Module:
    """The model of a checkpoint with its weights multiplied out and its transforms, float32, in evaluation mode.

    Raises:
        ArtifactError: it cannot be built from these files.
    """
    import transformers

    if read.model is None:
        raise ArtifactError(f"{read.folder}: its model cannot be built; see the problems above")
    config: Any = transformers.AutoConfig.from_pretrained(read.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    files = SafetensorsFolder(read.folder)
    modules = dict(read.model.named_modules())  # matrices of transforms are below none of them
    names = [name for name in files.names if name.rpartition(".")[0] in modules]
    state = {name: files.tensor(name) for name in names if name.rpartition(".")[2] not in SUFFIXES}
    for name, linear in read.linears.items():
        state[f"{name}.weight"] = QuantizedWeight(linear.codes, linear.weight_scale).dequantize()
    cls: Any = type(read.model)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = cls.from_pretrained(None, config=config, state_dict=state, dtype="float32")
    compute_transforms(read, model)
    return model.eval()


def compute_transforms(read: CompressedCheckpoint, model: nn.Module) -> None:
    """Has a loaded model compute the transforms that its checkpoint names; transformers up to 5.23 does not."""
    files = SafetensorsFolder(read.folder)

    def stored(name: str) -> torch.Tensor | None:
        return files.tensor(name) if name in files else None

    apply_online_transforms(model, read.transforms, stored, read.folder.name)


def _input(read: CompressedCheckpoint, linear: CompressedLinear) -> TensorQuantizer:
    if read.floating:
        return _float8(linear.input_scale)
    point = None if read.symmetric else torch.tensor(float(linear.input_zero_point))
    grid = IntegerGrid(-128, 127, 127.5 if read.symmetric else 255, read.symmetric, zero_point_first=True)
    return StaticQuantizer(grid, torch.tensor(linear.input_scale), point)


def _of_heads(scale: torch.Tensor) -> TensorQuantizer:
    """One scale, or one per head."""
    return Float8Quantizer(scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1), axes="heads")


def _float8(scale: float) -> TensorQuantizer:
    return Float8Quantizer(torch.tensor(scale, dtype=torch.float32))
