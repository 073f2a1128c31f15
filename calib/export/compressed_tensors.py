# SPDX-License-Identifier: Apache-2.0
"""A static W8A8 checkpoint in the compressed-tensors format; loading is tested in transformers.

The format derives a scale from a range as amax / 127.5 (symmetric, grid -128..127) or (max - min) / 255, not as
amax / 127, so scales are derived here from the ranges of `scales.json`. Weights have one scale per output row.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from calib.errors import ArtifactError, ModelError, UsageError
from calib.models import OpenedModel
from calib.schema.scales import ScaleFile, TensorScale

__all__ = ["CheckpointSummary", "input_grid", "weight_codes", "write_checkpoint"]

_SHARD = "5GB"
_CARRIED = (".json", ".txt", ".model", ".jinja")
_OWN = {"config.json", "calib_source.json"}


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds.

    Attributes:
        quantized: modules in INT8.
        in_float: modules left in floating point -> the reason.
    """

    quantized: list[str]
    in_float: dict[str, str]


def write_checkpoint(opened: OpenedModel, scales: ScaleFile, folder: Path) -> CheckpointSummary:
    """Writes weights, configuration and tokenizer into an existing folder.

    Raises:
        UsageError: the scales are not 8-bit and per tensor.
        ModelError: no linear layer of the model has a scale.
        ArtifactError: the scales are of another model, or the disk is full.
    """
    if scales.model.fingerprint != opened.provenance.fingerprint:
        raise ArtifactError(
            f"{opened.provenance.name}: the scales are of another model, {scales.model.name}; measure this one"
        )
    if scales.bits != 8:
        raise UsageError(f"checkpoint: --bits {scales.bits} has no checkpoint format here; only 8 has")
    by_module, in_float = _inputs(opened.model, scales)
    if not by_module:
        raise ModelError(
            f"{opened.provenance.name}: no linear layer has a scale of its input; measure linear_input sites"
        )
    symmetric = all(tensor.scheme.symmetric for tensor in by_module.values())
    state = {name: tensor.detach().cpu() for name, tensor in opened.model.state_dict().items()}
    for name, tensor in by_module.items():
        codes, scale = weight_codes(state[f"{name}.weight"])
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = codes, scale
        step, zero = input_grid(tensor)
        state[f"{name}.input_scale"] = torch.tensor([step], dtype=torch.float32)
        if not symmetric:
            state[f"{name}.input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
    _save(_untied(opened.model, state), folder)
    _write_config(opened, folder, sorted(in_float), symmetric=symmetric)
    for file in sorted(opened.folder.iterdir()):
        if file.suffix in _CARRIED and file.name not in _OWN and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    return CheckpointSummary(list(by_module), in_float)


def input_grid(tensor: TensorScale) -> tuple[float, int]:
    """Scale and zero point of an input on the grid -128..127, in the format's own float32 arithmetic."""
    low = torch.tensor(min(tensor.range_min, 0.0), dtype=torch.float32)
    high = torch.tensor(max(tensor.range_max, 0.0), dtype=torch.float32)
    if tensor.scheme.symmetric:
        return float(torch.maximum(-low, high) / 127.5), 0
    scale = (high - low) / 255.0
    return float(scale), int(torch.round(torch.clamp(-128.0 - low / scale, -128, 127)))


def weight_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 ``[out, in]`` and scales float32 ``[out, 1]`` of a weight; a row of zeros gets the smallest step."""
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    return torch.round(torch.clamp(values / scale, -128, 127)).to(torch.int8), scale


def _inputs(model: nn.Module, scales: ScaleFile) -> tuple[dict[str, TensorScale], dict[str, str]]:
    """Scale of the input of each linear layer, and why the others have none."""
    readers = {reader: t for name, t in scales.tensors.items() for reader in [name, *t.shared_with]}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, TensorScale] = {}
    in_float: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        tensor = readers.get(f"{name}:input")
        if module is head:
            in_float[name] = "the output head stays in floating point"
        elif tensor is None:
            in_float[name] = "its input was not measured, or was zero"
        elif tensor.scheme.granularity != "per-tensor":
            in_float[name] = f"its input has a {tensor.scheme.granularity} scale"
        else:
            found[name] = tensor
    return found, in_float


def _untied(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors to save: of names that share memory the first, the others are tied again by the reader."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.contiguous()
    return kept


def _save(state: dict[str, torch.Tensor], folder: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD)
    try:
        for file, names in split.filename_to_tensors.items():
            save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
    except SafetensorError as error:
        raise ArtifactError(f"{folder}: cannot be written ({error}); free space or choose another folder") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(opened: OpenedModel, folder: Path, ignore: list[str], *, symmetric: bool) -> None:
    config: dict[str, Any] = json.loads((opened.folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])  # transformers 4 ignores rope_parameters
    config["dtype"] = opened.provenance.dtype
    config.pop("torch_dtype", None)
    grid = {"num_bits": 8, "type": "int", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**grid, "symmetric": True, "strategy": "channel"},
                "input_activations": {**grid, "symmetric": symmetric, "strategy": "tensor"},
                "output_activations": None,
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
