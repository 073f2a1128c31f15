# SPDX-License-Identifier: Apache-2.0
"""Readers of labelled data, chosen by what the source is."""

from __future__ import annotations

import csv
import gzip
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from calib.corpus.media import SOUNDS
from calib.distill.data.records import Records, make_records
from calib.errors import CorpusError

__all__ = ["IMAGE_SUFFIXES", "read_records"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_TEXT_FIELDS = ("text", "sentence", "content", "question")
_FILE_FIELDS = ("image", "img", "audio")
_LABEL_FIELDS = ("label", "labels", "fine_label", "class", "category", "target")
# file names of MNIST and everything made in its likeness
_IDX = {"train": "train", "test": "t10k"}
_IDX_TYPE_UINT8 = 8


def read_records(source: str, split: str) -> Records:
    """Reads one split of a labelled data set.

    Args:
        source: `hub:owner/name[@config]` (needs `datasets`); a folder with one folder of images or .wav files per
            class, below the name of the split if there is one; a folder of IDX files as MNIST's; a folder with
            `SPLIT.jsonl`, `SPLIT.csv`, `SPLIT.tsv`, `SPLIT.parquet` or `SPLIT.safetensors` (tensors `inputs` and
            `labels`); or one such file, whatever the split.
        split: `train`, `test` or another name that the source has.

    Raises:
        CorpusError: nothing there, no such split, or samples without usable fields.
    """
    if source.startswith("hub:"):
        return _read_hub(source, split)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise CorpusError(f"data {source}: no such file or folder; pass a path or hub:OWNER/NAME")
    for suffix in _FILES:
        if (path / f"{split}{suffix}").is_file():
            return _read_file(path / f"{split}{suffix}")
    prefix = _IDX.get(split, split)
    images = sorted(path.glob(f"{prefix}-images*ubyte*"))
    if images:
        return _read_idx(images[0], source)
    others = sorted(file.stem for file in path.iterdir() if file.suffix in _FILES)
    if others:
        raise CorpusError(f"data {source}: no split {split}; there is {', '.join(others[:8])}")
    return _read_class_folders(path / split if (path / split).is_dir() else path, source)


def _read_file(path: Path) -> Records:
    reader = _FILES.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(f"data {path}: unsupported suffix; give {', '.join(_FILES)} or a folder of images")
    try:
        return reader(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorpusError(f"data {path}: cannot be read ({reason}); write it again") from error


def _read_jsonl(path: Path) -> Records:
    lines = path.read_text(encoding="utf-8").splitlines()
    return _from_rows((json.loads(line) for line in lines if line.strip()), str(path), folder=path.parent)


def _read_csv(path: Path) -> Records:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    return _from_rows(rows, str(path), numbers=True, folder=path.parent)


def _read_parquet(path: Path) -> Records:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"data {path}: parquet needs pyarrow; pip install calib[datasets]") from error
    return _from_rows(parquet.read_table(path).to_pylist(), str(path))


def _read_safetensors(path: Path) -> Records:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not {"inputs", "labels"} <= tensors.keys() or len(tensors["inputs"]) != len(tensors["labels"]):
        raise CorpusError(f"data {path}: needs tensors `inputs` and `labels` of one length; found {', '.join(tensors)}")
    return make_records(list(tensors["inputs"]), tensors["labels"].long().tolist(), str(path))


_FILES: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".safetensors": _read_safetensors,
}


def _from_rows(
    rows: Iterable[Any],
    source: str,
    *,
    numbers: bool = False,
    names: list[str] | None = None,
    folder: Path | None = None,
) -> Records:
    inputs: list[Any] = []
    labels: list[Any] = []
    for row in rows:
        fields = row.keys() if isinstance(row, dict) else ()
        content = next((name for name in (*_TEXT_FIELDS, *_FILE_FIELDS) if name in fields), None)
        label = next((name for name in _LABEL_FIELDS if name in fields), None)
        if content is None or label is None:
            missing = "label" if content else "text or image or audio"
            raise CorpusError(
                f"data {source}: no {missing} among the fields {', '.join(fields)}; name them text and label"
            )
        # a list names files relative to its own folder
        is_file = content in _FILE_FIELDS and folder is not None and isinstance(row[content], str)
        inputs.append(folder / row[content] if is_file and folder is not None else row[content])
        labels.append(row[label])
    if numbers and all(isinstance(label, str) and label.isdigit() for label in labels):
        labels = [int(label) for label in labels]
    return make_records(inputs, labels, source, names)


def _read_idx(images: Path, source: str) -> Records:
    """MNIST's format: magic number, sizes, bytes; https://yann.lecun.com/exdb/mnist."""
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels.is_file():
        raise CorpusError(f"data {source}: {images.name} without {labels.name}; copy both")
    pixels = _idx(images)
    return make_records(list(pixels[:, None]), _idx(labels).long().tolist(), source)


def _idx(path: Path) -> torch.Tensor:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        _, kind, dimensions = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{dimensions}I", raw, 4)
        values = torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * dimensions)
        if kind != _IDX_TYPE_UINT8:
            raise ValueError(f"type {kind} instead of bytes")
        return values.reshape(shape)
    except (OSError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise CorpusError(f"data {path}: not an IDX file ({str(error).splitlines()[0]}); download it again") from error


def _read_class_folders(path: Path, source: str) -> Records:
    names = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = [
        (file, number)
        for number, name in enumerate(names)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in (*IMAGE_SUFFIXES, *SOUNDS)
    ]
    if not files:
        raise CorpusError(f"data {source}: {path} holds no images or .wav files; expected one folder of them per class")
    return make_records([file for file, _ in files], [number for _, number in files], source, names)


def _read_hub(source: str, split: str) -> Records:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"data {source}: hub data sets need an optional package; pip install calib[datasets]"
        ) from error
    name, _, config = source.removeprefix("hub:").partition("@")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the loader raises anything: network, parsing, script and configuration errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"data {source}: cannot be loaded ({reason}); check the name, the split and the network"
        ) from error
    if "audio" in found.features:  # as the files are: decoding would need yet another package
        found = found.cast_column("audio", datasets.Audio(decode=False))
    label = next((field for field in _LABEL_FIELDS if field in found.features), None)
    names = getattr(found.features.get(label), "names", None) if label else None
    return _from_rows(found, source, names=names)
