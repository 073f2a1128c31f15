# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ checkpoints, whose packed integers are multiplied out: the model then runs on any device.

transformers runs such weights through gptqmodel alone, whose kernels are for GPUs. A layer's activations are the same
up to the rounding of arithmetic, for those kernels multiply out too.

GPTQ: ``qweight`` int32 ``[in / n, out]`` holds n = 32 / bits codes of neighbouring inputs per word, lowest bits first;
``qzeros`` ``[groups, out / n]`` likewise along the outputs, one less than the zero point (format ``gptq``) or the zero
point itself (``gptq_v2``); ``scales`` ``[groups, out]``; ``g_idx`` ``[in]`` names the group of each input.
AWQ (version ``gemm``): ``qweight`` ``[in, out / 8]`` and ``qzeros`` ``[groups, out / 8]``, 4 bits, whose nibble i is
output ``(0, 2, 4, 6, 1, 3, 5, 7)[i]`` of its eight. Both: weight = (code - zero) * scale. Source: AutoGPTQ 0.7,
`nn_modules/qlinear`; AutoAWQ 0.2, `utils/packing_utils.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calib.errors import ModelError
from calib.models.checkpoint import Checkpoint

__all__ = ["is_packed", "unpacked_state"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether the weights of a checkpoint are packed by GPTQ or AWQ."""
    return _settings(checkpoint).get("quant_method") in ("gptq", "awq")


def unpacked_state(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, packed weights as float32 ``[out, in]``.

    Raises:
        ModelError: the packing is of a kind that is not read here, or its tensors do not fit each other.
    """
    settings = _settings(checkpoint)
    method, bits = str(settings["quant_method"]), int(settings.get("bits", settings.get("w_bit", 4)))
    kind = str(settings.get("checkpoint_format" if method == "gptq" else "version") or "").lower()
    readable = {"gptq": ("", "gptq", "gptq_v2"), "awq": ("", "gemm")}[method]
    widths = {"gptq": (2, 4, 8), "awq": (4,)}[method]
    if kind not in readable or bits not in widths:
        raise ModelError(
            f"model {name}: its {method} weights are packed as {kind or 'usual'} with {bits} bits, which is not read "
            "here; pass the checkpoint before quantization"
        )
    state = _tensors(checkpoint, name)
    layers = sorted(key.removesuffix(".qweight") for key in state if key.endswith(".qweight"))
    if not layers:
        raise ModelError(f"model {name}: config.json says {method}, and no tensor is packed; fetch it again")
    for layer in layers:
        parts = {part: state.pop(f"{layer}.{part}") for part in _PARTS if f"{layer}.{part}" in state}
        try:
            weight = _awq(parts) if method == "awq" else _gptq(parts, bits, offset=0 if kind == "gptq_v2" else 1)
        except (KeyError, RuntimeError, IndexError) as error:
            raise ModelError(
                f"model {name}: the packed tensors of {layer} do not fit each other ({error}); fetch it again"
            ) from error
        state[f"{layer}.weight"] = weight
    return state


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    found = checkpoint.config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _tensors(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files: list[Path] = [path for path in checkpoint.weight_files if path.suffix == ".safetensors"]
    if len(files) < len(checkpoint.weight_files):
        raise ModelError(f"model {name}: packed weights are read from safetensors only; convert its files")
    return {key: tensor for path in files for key, tensor in load_file(path).items()}


def _gptq(parts: dict[str, torch.Tensor], bits: int, *, offset: int) -> torch.Tensor:
    scales = parts["scales"].float()
    codes = _codes(parts["qweight"].T, bits).T  # [in, out]
    zeros = (_codes(parts["qzeros"], bits) + offset) & (2**bits - 1)
    inputs = codes.shape[0]
    groups = parts.get("g_idx")
    if groups is None:
        groups = torch.arange(inputs) // (inputs // scales.shape[0])
    groups = groups.long()
    weight: torch.Tensor = (codes - zeros[groups]).float() * scales[groups]
    return weight.T.contiguous()


def _awq(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    scales = parts["scales"].float()
    codes, zeros = _in_order(_codes(parts["qweight"], 4)), _in_order(_codes(parts["qzeros"], 4))
    group = codes.shape[0] // scales.shape[0]
    weight = (codes - zeros.repeat_interleave(group, 0)).float() * scales.repeat_interleave(group, 0)
    return weight.T.contiguous()


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int32 ``[rows, words * 32 / bits]`` of int32 ``[rows, words]``, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: torch.Tensor = (words.contiguous().unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.reshape(words.shape[0], -1)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """Each eight codes of AWQ in the order of their outputs."""
    places = torch.argsort(torch.tensor(_AWQ_ORDER))
    return codes.reshape(codes.shape[0], -1, 8)[..., places].reshape(codes.shape[0], -1)
