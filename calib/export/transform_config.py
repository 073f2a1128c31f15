# SPDX-License-Identifier: Apache-2.0
"""`transform_config` of a compressed-tensors checkpoint: rotations of inputs that its reader computes.

The format has block-diagonal Sylvester-Hadamard matrices, the ones of `InputRotation`: type ``hadamard``, ``head_dim``
channels per block, location ``input``. Weights are stored as they are behind the rotation. The matrix is stored too,
unscaled, once per size under the first layer, as llm-compressor stores it. Source: compressed-tensors 0.20,
`transform/factory/hadamard.py`; vLLM 0.32, `quantization/compressed_tensors/transform/linear.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from calib.cures.hadamard import hadamard, power_of_two_in
from calib.cures.rotate import OnlineRotation
from calib.errors import ArtifactError
from calib.models.transforms import online_transforms
from calib.schema.scales import CureRecord, ScaleFile

__all__ = ["online_rotations", "transform_config", "transform_tensors"]


def transform_config(scales: ScaleFile, model: nn.Module) -> dict[str, Any] | None:
    """What a reader must be told of the cures of a scale file; None if it need not know of any.

    Raises:
        ArtifactError: a rotation has signs, for which this form has no place.
    """
    groups: dict[str, Any] = {}
    for record in scales.cures:
        if record.name != "rotate-online":
            continue
        if record.settings.get("signs_seed") is not None:
            raise ArtifactError(
                f"{scales.model.name}: its inputs are rotated with signs, which no checkpoint holds; rotate without"
            )
        for block, names in _blocks(record, model).items():
            groups[f"R4_{block}"] = {
                "type": "hadamard",
                "apply": [{"targets": names, "location": "input", "inverse": False, "ignore": []}],
                "randomize": False,
                "requires_grad": False,
                "head_dim": block,
                "precision": "torch.float32",
            }
    return {"config_groups": groups} if groups else None


def transform_tensors(config: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """The matrices of a configuration that `transform_config` made, float32, entries 1 and -1."""
    tensors = {}
    for group, scheme in (config or {"config_groups": {}})["config_groups"].items():
        first = scheme["apply"][0]["targets"][0]
        tensors[f"{first}.{group}_input.weight"] = hadamard(scheme["head_dim"]).sign()
    return tensors


def online_rotations(settings: dict[str, Any] | None, model: nn.Module, name: str) -> list[CureRecord]:
    """The rotations that a checkpoint names, as records of a scale file, so that nobody takes its ranges for others.

    Args:
        settings: `transform_config` of a checkpoint, ours or another program's.
        model: its architecture.
        name: of the checkpoint, for messages.

    Raises:
        ArtifactError: it has a transform of another kind.
        ModelError: it cannot be read.
    """
    config = online_transforms(settings, name)
    if config is None:
        return []
    from compressed_tensors.utils import match_named_modules

    blocks: dict[int, list[str]] = {}
    for scheme in config.config_groups.values():
        for one in scheme.apply:
            if (scheme.type, one.location, one.inverse, scheme.randomize) != ("hadamard", "input", False, False):
                raise ArtifactError(
                    f"{name}: has a transform of type {scheme.type} at {one.location}, and scales behind it mean "
                    "nothing without it; only plain Hadamard rotations of inputs are read here"
                )
            for target, module in match_named_modules(model, one.targets, one.ignore):
                blocks.setdefault(scheme.head_dim or module.in_features, []).append(target)
    return [OnlineRotation(tuple(names), block).record() for block, names in blocks.items()]


def _blocks(record: CureRecord, model: nn.Module) -> dict[int, list[str]]:
    """Channels per block -> layers."""
    largest, names = record.settings.get("largest_block"), record.settings.get("modules")
    assert isinstance(largest, int)
    assert isinstance(names, list)
    found: dict[int, list[str]] = {}
    for name in map(str, names):
        width = model.get_submodule(name).get_parameter("weight").shape[1]
        found.setdefault(min(largest, power_of_two_in(width)), []).append(name)
    return found
