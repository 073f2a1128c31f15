# SPDX-License-Identifier: Apache-2.0
"""A folder that transformers and serving stacks open: weights in safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from calib.errors import ArtifactError
from calib.models import OpenedModel

__all__ = ["copy_companions", "read_config", "save_weights", "write_config"]

_CARRIED = (".json", ".txt", ".model", ".jinja")
_OWN = {"config.json", "calib_source.json", "scales.json", "calib_export.json", "hf_quant_config.json"}


def save_weights(state: dict[str, torch.Tensor], folder: Path, shard_size: str = "5GB") -> None:
    """Writes tensors as one or several safetensors files, with an index if there are several.

    Args:
        state: by name; of names that share memory the first is written, the reader ties the others again.
        folder: exists.
        shard_size: largest size of a file, as huggingface_hub reads it.

    Raises:
        ArtifactError: the disk is full.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = _untied(state)
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_size)
    try:
        for file, names in split.filename_to_tensors.items():
            save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
    except SafetensorError as error:
        raise ArtifactError(f"{folder}: cannot be written ({error}); free space or choose another folder") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_config(opened: OpenedModel) -> dict[str, Any]:
    """The model's configuration, readable by transformers 4 too, which ignores `rope_parameters`."""
    config: dict[str, Any] = json.loads((opened.folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    config["dtype"] = opened.provenance.dtype
    config.pop("torch_dtype", None)
    return config


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Writes `config.json`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(opened: OpenedModel, folder: Path) -> None:
    """Copies tokenizer, chat template and generation settings."""
    for file in sorted(opened.folder.iterdir()):
        if file.suffix in _CARRIED and file.name not in _OWN and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.contiguous()
    return kept
