# SPDX-License-Identifier: Apache-2.0
"""What lies in a checkpoint folder, read and checked before a single weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import ModelError
from calib.models.reason import reason

if TYPE_CHECKING:
    import torch

__all__ = ["SOURCE_FILE", "Checkpoint", "TensorHeader", "read_checkpoint", "read_headers"]

# Written by the GGUF converter beside the weights: what they were made from.
SOURCE_FILE = "calib_source.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model and its configuration as plain data."""

    folder: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    tokenizer_files: tuple[Path, ...]
    source_format: str

    @property
    def architecture(self) -> str | None:
        """The class that wrote the checkpoint, as its configuration names it."""
        names = self.config.get("architectures")
        return str(names[0]) if names else None

    @property
    def model_type(self) -> str:
        """`model_type` of the configuration, e.g. llama."""
        return str(self.config.get("model_type", ""))

    def tensor(self, name: str) -> torch.Tensor | None:
        """One stored tensor, on the CPU; None if no safetensors file has it."""
        from safetensors import safe_open

        for path in self.weight_files:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    if name in file.keys():  # noqa: SIM118 - not a mapping
                        found: torch.Tensor = file.get_tensor(name)
                        return found
        return None


@dataclass(frozen=True)
class TensorHeader:
    """Name, dtype (as safetensors spells it: F32, BF16 ...) and shape of a stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read the configuration of a folder and list its weight and tokenizer files.

    Raises:
        ModelError: `config.json` is missing or damaged, or weight files are missing.
    """
    config = _read_json(folder / "config.json", name)
    weight_files = _weight_files(folder, name)
    source_format = "safetensors" if weight_files[0].suffix == ".safetensors" else "pytorch"
    if (folder / SOURCE_FILE).is_file():
        source = _read_json(folder / SOURCE_FILE, name)
        source_format = f"{source.get('format')}:{source.get('quantization')}"
    tokenizer = folder / "tokenizer.json"
    candidates = [tokenizer] if tokenizer.is_file() else [folder / file for file in TOKENIZER_FILES]
    return Checkpoint(
        folder=folder,
        config=config,
        weight_files=weight_files,
        tokenizer_files=tuple(sorted(path for path in candidates if path.is_file())),
        source_format=source_format,
    )


def read_headers(checkpoint: Checkpoint, name: str) -> list[TensorHeader]:
    """Dtype and shape of every tensor in the safetensors files; empty for pickled weights.

    Opening a file also compares its length with its header, so a truncated one is found here.

    Raises:
        ModelError: a file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    headers: list[TensorHeader] = []
    for path in checkpoint.weight_files:
        if path.suffix != ".safetensors":
            continue
        try:
            # "np" maps the file read-only; "pt" asks for memory that a model too large for this machine cannot get.
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(key)
                    headers.append(TensorHeader(key, str(part.get_dtype()), tuple(part.get_shape())))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model {name}: {path.name} is truncated or damaged ({reason(error)}); fetch it again"
            ) from error
    return headers


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model {name}: no {path.name} in its folder; pass the folder of a checkpoint") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"model {name}: {path.name} is not valid JSON ({reason(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"model {name}: {path.name} holds no JSON object; fetch it again")
    return content


def _weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    first = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if first is None:
        raise ModelError(
            f"model {name}: no weights beside config.json; expected model.safetensors or pytorch_model.bin"
        )
    if first.suffix != ".json":
        return (first,)
    index = _read_json(first, name).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ModelError(f"model {name}: {first.name} has no weight_map; fetch it again")
    shards = [folder / file for file in sorted(set(map(str, index.values())))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(
            f"model {name}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}; fetch them"
        )
    return tuple(shards)
