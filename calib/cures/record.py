# SPDX-License-Identifier: Apache-2.0
"""What a smoothing leaves behind: an entry for `cures` of scales.json, and a file that can apply it again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calib.cures.pairs import Consumer, Pair
from calib.cures.smooth import Smoothing
from calib.errors import ArtifactError
from calib.schema.scales import CureRecord

__all__ = ["load_smoothing", "save_smoothing", "smoothing_record"]

FORMAT = "calib.smoothing"
VERSION = "1.0"


class _PairHead(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    producer: str
    whole: bool
    rule: Literal["norm", "norm_plus_one", "linear"]
    consumers: list[str] = Field(min_length=1)
    alpha: float = Field(ge=0, le=1)


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["calib.smoothing"]
    version: str
    include_sink: bool
    pairs: list[_PairHead]


def smoothing_record(smoothing: Smoothing) -> CureRecord:
    """An entry of `cures` in scales.json: what was done, to which pairs, and the hash of the scales."""
    alphas = {pair.name: alpha for pair, alpha in zip(smoothing.pairs, smoothing.alphas, strict=True)}
    used = sorted(set(smoothing.alphas))
    with_alpha = f"alpha {used[0]:g}" if len(used) == 1 else f"alpha {used[0]:g} to {used[-1]:g}"
    return CureRecord(
        kind="smooth",
        summary=f"{len(alphas)} tensors divided channel by channel, their weights multiplied ({with_alpha})",
        settings={
            "alphas": alphas,
            "include_sink": smoothing.include_sink,
            "scales_sha256": _sha256(smoothing),
        },
    )


def save_smoothing(smoothing: Smoothing, path: Path) -> None:
    """Writes pairs, alphas and scales as one safetensors file, all of it or nothing.

    Raises:
        ArtifactError: the file cannot be written.
    """
    head = _Head(
        format="calib.smoothing",
        version=VERSION,
        include_sink=smoothing.include_sink,
        pairs=[
            _PairHead(
                producer=p.producer, whole=p.whole, rule=p.rule, consumers=[c.module for c in p.consumers], alpha=a
            )
            for p, a in zip(smoothing.pairs, smoothing.alphas, strict=True)
        ],
    )
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(smoothing), work, metadata={"smoothing": head.model_dump_json()})
        work.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be written ({error}); free space or choose another folder") from None
    finally:
        work.unlink(missing_ok=True)


def load_smoothing(path: Path) -> Smoothing:
    """Reads what `save_smoothing` wrote.

    Raises:
        ArtifactError: the file is missing, damaged, something else, or of an unknown major version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            head = _head(path, (file.metadata() or {}).get("smoothing"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: is no readable safetensors file ({error}); write it again") from None
    try:
        pairs = tuple(
            Pair(
                one.producer,
                tensors[f"{i}.rows"],
                one.whole,
                tuple(Consumer(name, tensors[f"{i}.{k}.channels"]) for k, name in enumerate(one.consumers)),
                one.rule,
            )
            for i, one in enumerate(head.pairs)
        )
        scales = tuple(tensors[f"{i}.scales"] for i in range(len(pairs)))
    except KeyError as error:
        raise ArtifactError(f"{path}: field {error} is missing; write it again") from None
    return Smoothing(pairs, tuple(p.alpha for p in head.pairs), scales, head.include_sink)


def _head(path: Path, text: str | None) -> _Head:
    try:
        content = json.loads(text or "")
        if content.get("format") != FORMAT:
            raise ValueError
    except (ValueError, AttributeError):
        raise ArtifactError(f"{path}: holds no smoothing; pass a file that `save_smoothing` wrote") from None
    version = str(content.get("version"))
    if version.partition(".")[0] != VERSION.partition(".")[0]:
        raise ArtifactError(f"{path}: has version {version}, this calib reads {VERSION}; update calib")
    try:
        return _Head.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}; write it again") from None


def _tensors(smoothing: Smoothing) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    for i, (pair, scales) in enumerate(zip(smoothing.pairs, smoothing.scales, strict=True)):
        tensors |= {f"{i}.scales": np.ascontiguousarray(scales), f"{i}.rows": np.ascontiguousarray(pair.rows)}
        tensors |= {f"{i}.{k}.channels": np.ascontiguousarray(c.channels) for k, c in enumerate(pair.consumers)}
    return tensors


def _sha256(smoothing: Smoothing) -> str:
    digest = hashlib.sha256()
    for pair, scales in zip(smoothing.pairs, smoothing.scales, strict=True):
        digest.update(pair.name.encode() + b"\0" + np.asarray(scales, "<f4").tobytes())
    return digest.hexdigest()
