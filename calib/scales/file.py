# SPDX-License-Identifier: Apache-2.0
"""Writing and reading `scales.json`, validated both ways against the published schema."""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from calib.errors import ArtifactError
from calib.schema.scales import FORMAT, VERSION, ScaleFile

__all__ = ["FILE_NAME", "json_schema", "load_scales", "save_scales"]

FILE_NAME = "scales.json"


def save_scales(scale_file: ScaleFile, folder: Path) -> Path:
    """Writes `scales.json` into a folder, which is made if it is missing; all of it or nothing.

    Returns:
        The path of the file.

    Raises:
        ArtifactError: the record is not valid, or the file cannot be written.
    """
    # a record built or copied without validation must not reach a file
    record = _validated(scale_file.model_dump(mode="json"), Path(folder) / FILE_NAME)
    path = Path(folder) / FILE_NAME
    temporary = path.with_name(f".{FILE_NAME}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(_text(record), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from None
    return path


def load_scales(path: Path) -> ScaleFile:
    """Reads a scale file, given its path or its folder.

    Raises:
        ArtifactError: it is missing, damaged, no scale file, of an unknown major version, or violates the schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; write one with `calib quantize`") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    except ValueError as error:  # no JSON, or not even text
        raise ArtifactError(f"{path}: not valid JSON ({error}); write it again with `calib quantize`") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: not a scale file (format is not '{FORMAT}'); give one that `calib quantize` wrote"
        )
    version = str(content.get("version"))
    if version.partition(".")[0] != VERSION.partition(".")[0]:
        raise ArtifactError(
            f"{path}: version {version} is not readable by this calib (version {VERSION}); update calib"
        )
    return _validated(content, path)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file, generated from its record; the committed copy is `calib/schema/scales.schema.json`."""
    schema = ScaleFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _validated(content: dict[str, Any], path: Path) -> ScaleFile:
    try:
        return ScaleFile.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = first["msg"].replace("\n", " ")
        raise ArtifactError(
            f"{path}: {place}: {message}{more}; correct it or write the file again with `calib quantize`"
        ) from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _text(record: ScaleFile) -> str:
    """One line per tensor: readable, comparable by line, and small."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    content = record.model_dump(mode="json")
    parts = []
    for key, value in content.items():
        if key == "tensors" and value:
            lines = ",\n".join(f"    {compact(name)}: {compact(tensor)}" for name, tensor in value.items())
            parts.append(f'  "tensors": {{\n{lines}\n  }}')
        else:
            parts.append(f"  {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
