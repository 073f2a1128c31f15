# SPDX-License-Identifier: Apache-2.0
"""`Checkpoint`: the state of a training in one file, replaced as a whole, so that a kill never leaves half of one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calib.errors import ArtifactError

__all__ = ["Checkpoint"]

_TENSOR, _KEYS = "tensor", "keys"


class Checkpoint:
    """A tree of dictionaries, lists, tensors, numbers, words and None in a safetensors file: no pickle.

    Args:
        path: the file; its folder exists.
        seconds: how old a checkpoint may grow while a training runs.
    """

    def __init__(self, path: Path, *, seconds: float = 30.0) -> None:
        self.path, self.seconds = path, seconds
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        """Writes beside the file, then puts it in its place.

        Raises:
            ArtifactError: the disk is full or fails.
        """
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_packed(state, tensors), allow_nan=True)
        beside = self.path.with_name(f"{self.path.name}.writing")
        try:
            save_file(tensors, beside, metadata={"state": tree})
            beside.replace(self.path)
            self._saved = time.monotonic()
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.path}: the checkpoint cannot be written ({error}); free some space and resume"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """What was saved last, tensors on the CPU; None if nothing was.

        Raises:
            ArtifactError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                tree = json.loads(file.metadata()["state"])
                found = _unpacked(tree, file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self.path}: damaged checkpoint ({error}); remove it and run again") from error
        assert isinstance(found, dict)
        return found


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON that names its tensors; keys of dictionaries keep their type."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # a copy each: safetensors refuses tensors that share memory
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {_KEYS: [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(item, tensors) for item in value]
    return value


def _unpacked(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, file) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            tensor: torch.Tensor = file.get_tensor(value[_TENSOR])
            return tensor
        return {key: _unpacked(item, file) for key, item in value[_KEYS]}
    return value
