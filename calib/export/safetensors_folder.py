# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint folder, read one by one, with everything that is wrong with its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["SafetensorsFolder"]

INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """The safetensors files of a folder, with or without an index.

    Args:
        folder: to read.
        single: name of the file where there is no index.

    Attributes:
        names: tensors that can be read, each with its file.
        problems: files that are missing, truncated or disagree with the index, one line each.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors") -> None:
        self.folder = folder
        self.names: dict[str, Path] = {}
        self.problems: list[str] = []
        listed = self._index()
        files = sorted(set(listed.values())) if listed else [single]
        held: dict[str, str] = {}
        for file in files:
            path = folder / file
            if not path.is_file():
                self.problems.append(f"{file}: is missing")
                continue
            try:
                with safe_open(path, framework="pt") as opened:
                    held |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                self.problems.append(f"{file}: is truncated or damaged ({' '.join(str(error).split())})")
        for name, file in listed.items():
            if held.get(name) != file and (folder / file).is_file():
                self.problems.append(f"{name}: the index places it in {file}, which does not hold it")
        self.names = {name: folder / file for name, file in held.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.names[name], framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError):
            self.problems.append(f"{INDEX}: is damaged")
            return {}
