# SPDX-License-Identifier: Apache-2.0
"""Reads AIMET encodings of the versions 0.6.1, 1.0.0 and 2.0.0, ours or those of AIMET."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import ArtifactError
from calib.export.aimet import Encoding

__all__ = ["read_aimet"]


def read_aimet(path: Path) -> dict[str, Encoding]:
    """8-bit integer encodings by name; scales as float32 numbers, zero points on -128..127.

    Raises:
        ArtifactError: the file is missing, damaged, of another version, or holds other encodings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = str(content["version"])
        if version == "0.6.1":
            found = [
                _version_0(name, entries, parameter=parameter)
                for parameter, section in ((False, "activation_encodings"), (True, "param_encodings"))
                for name, entries in content[section].items()
            ]
        elif version == "1.0.0":
            found = [
                _version_1(entry, parameter=parameter)
                for parameter, section in ((False, "activation_encodings"), (True, "param_encodings"))
                for entry in content[section]
            ]
        elif version.startswith("2."):
            found = [_version_2(entry) for entry in content["encodings"]]
        else:
            raise ArtifactError(f"{path}: version {version} of the encodings is not read; 0.6.1, 1.0.0 and 2 are")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); export again") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{path}: is damaged ({' '.join(str(error).split())}); export again") from None
    return {one.name: one for one in found}


def _version_0(name: str, entries: list[dict[str, Any]], *, parameter: bool) -> Encoding:
    _require(name, entries[0]["bitwidth"] == 8 and entries[0]["dtype"] == "int")
    scale = [_scale(entry["scale"]) for entry in entries]
    point = -int(entries[0]["offset"]) - 128
    return Encoding(name, parameter, scale, point, str(entries[0]["is_symmetric"]) == "True")


def _version_1(entry: dict[str, Any], *, parameter: bool) -> Encoding:
    name = str(entry["name"])
    _require(name, entry["bw"] == 8 and entry["dtype"] == "INT")
    point = -int(entry["offset"][0]) - 128
    return Encoding(name, parameter, [_scale(s) for s in entry["scale"]], point, bool(entry["is_sym"]))


def _version_2(entry: dict[str, Any]) -> Encoding:
    name = str(entry["name"])
    _require(name, entry["output_dtype"] in ("int8", "uint8") and "block_size" not in entry)
    scale, point = entry["y_scale"], entry.get("y_zero_point", 0)
    first = int(point[0] if isinstance(point, list) else point)
    shift = 128 if entry["output_dtype"] == "uint8" else 0
    scales = [_scale(s) for s in (scale if isinstance(scale, list) else [scale])]
    return Encoding(name, isinstance(scale, list), scales, first - shift, first == shift, int(entry.get("axis", 1)))


def _scale(value: Any) -> float:
    return float(np.float32(value))


def _require(name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name}: is no 8-bit integer per tensor or channel")
