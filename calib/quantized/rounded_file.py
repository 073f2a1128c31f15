# SPDX-License-Identifier: Apache-2.0
"""Weights that were rounded before, with error compensation, as a file beside scales.json, which cannot hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calib.errors import ArtifactError
from calib.quantized.weights import QuantizedWeight

__all__ = ["ROUNDED_FILE", "load_rounded", "rounded_sha256", "save_rounded"]

ROUNDED_FILE = "rounded_weights.safetensors"
FORMAT = "calib.rounded_weights 1"
_PARTS = ("codes", "scale", "zero_point")


def save_rounded(weights: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Writes codes, scales and zero points as ``MODULE:codes``, ``MODULE:scale`` and ``MODULE:zero_point``.

    Raises:
        ArtifactError: the disk is full or fails.
    """
    tensors = {
        f"{name}:{part}": tensor.cpu().contiguous()
        for name, weight in weights.items()
        for part in _PARTS
        if (tensor := getattr(weight, part)) is not None
    }
    try:
        save_file(tensors, path, metadata={"format": FORMAT})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be written ({error}); free space or choose another folder") from None


def load_rounded(path: Path, digests: Mapping[str, str]) -> dict[str, QuantizedWeight]:
    """Reads what `save_rounded` wrote.

    Args:
        path: the file.
        digests: module -> `rounded_sha256` of its weight.

    Raises:
        ArtifactError: the file is missing or damaged, or holds other weights than the digests are of.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ArtifactError(f"{path}: holds no rounded weights of a format that is known; quantize again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: is no readable safetensors file ({error}); quantize again") from None
    found = {}
    for name, digest in digests.items():
        codes, scale = tensors.get(f"{name}:codes"), tensors.get(f"{name}:scale")
        if codes is None or scale is None or rounded_sha256(codes, scale) != digest:
            raise ArtifactError(f"{path}: {name}: is not the weight that was rounded for these scales; quantize again")
        found[name] = QuantizedWeight(codes, scale, tensors.get(f"{name}:zero_point"))
    return found


def rounded_sha256(codes: torch.Tensor, scale: torch.Tensor) -> str:
    """Hash of codes ``[outputs, inputs]`` row by row and of their scales, one per row or group, float32."""
    digest = hashlib.sha256()
    for tensor in (codes, scale.float().reshape(len(scale), -1).expand(len(codes), -1)):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
