# SPDX-License-Identifier: Apache-2.0
"""`import_scales`: a scale file from an export, ours or that of another program.

What an export lacks is not made up: ranges are those that the scales stand for, errors are absent, and the corpus is
empty unless a scale file lies beside.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from calib import __version__
from calib.errors import ArtifactError, CalibError
from calib.export.aimet import FILE as ENCODINGS
from calib.export.aimet import Encoding
from calib.export.implied_range import asymmetric_range, symmetric_range
from calib.export.linears import LinearRange
from calib.export.read_aimet import read_aimet
from calib.export.read_compressed_tensors import CompressedLinear, read_compressed_tensors
from calib.export.read_onnx import QdqLinear, read_onnx
from calib.export.transform_config import online_rotations
from calib.models.checkpoint import read_checkpoint
from calib.models.hashing import sha256_of_file
from calib.models.provenance import tokenizer_sha256
from calib.scales.file import FILE_NAME, load_scales
from calib.scales.float8 import FLOAT8_MAX
from calib.schema.provenance import CorpusProvenance, ModelProvenance, Producer
from calib.schema.scales import CureRecord, ExpectedError, HeadScales, ScaleFile, Scheme, TensorScale

__all__ = ["import_scales"]

_UNKNOWN = ExpectedError(sqnr_db=None, body_sqnr_db=None, rel_mae=None, clipped=None, zeroed=None)
Tensors = dict[str, TensorScale]


def import_scales(path: Path) -> ScaleFile:
    """Reads a compressed-tensors checkpoint, a Q/DQ graph or AIMET encodings, given the file or its folder.

    Raises:
        ArtifactError: it is none of these, or something in it is wrong; the message names the first tensor.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    beside = _beside(folder)
    ignore: list[str] = []
    cures: list[CureRecord] = []
    if path.suffix == ".encodings" or (path.is_dir() and (path / ENCODINGS).is_file()):
        file = path / ENCODINGS if path.is_dir() else path
        tensors, kind = _from_aimet(file, beside), "aimet"
    elif path.suffix == ".onnx" or (path.is_dir() and any(path.glob("*.onnx"))):
        file = path if path.is_file() else sorted(path.glob("*.onnx"))[0]
        tensors, kind = _from_onnx(file), "onnx-qdq"
    elif (folder / "config.json").is_file():
        file = folder / "config.json"
        tensors, ignore, cures = _from_checkpoint(folder)
        kind = "compressed-tensors"
    else:
        raise ArtifactError(
            f"{path}: is no compressed-tensors checkpoint, Q/DQ graph or AIMET encodings; calib formats lists what is"
        )
    if not tensors:
        raise ArtifactError(f"{path}: holds no 8-bit scale that can be read; pass another export")
    return ScaleFile(
        producer=Producer(version=__version__),
        model=beside.model if beside is not None else _model(folder, kind),
        corpus=beside.corpus if beside is not None else _no_corpus(),
        measurement_sha256=sha256_of_file(file),
        method=f"imported:{kind}",
        bits=8,
        tensors=tensors,
        cures=beside.cures if beside is not None else cures,
        coverage=dict(sorted(Counter(tensor.kind for tensor in tensors.values()).items())),
        ignore=ignore,
        verdict="static",
        reason=f"imported from {kind}; no error was measured",
    )


def _from_checkpoint(folder: Path) -> tuple[Tensors, list[str], list[CureRecord]]:
    read = read_compressed_tensors(folder)
    if read.problems:
        raise ArtifactError(f"{folder}: {read.problems[0]}; correct it, or pass another export")
    tensors: Tensors = {}
    for name, linear in read.linears.items():
        tensors |= _checkpoint_linear(name, linear, floating=read.floating, symmetric=read.symmetric)
    for name, (key, value) in read.kv.items():
        for port, scale in (("key", key), ("value", value)):
            tensors[f"{name}:{port}"] = _key_or_value(name, port, scale)
    assert read.model is not None, "that would be a problem"
    cures = online_rotations(read.transforms, read.model, folder.name)
    return tensors, [name for name in read.ignored if not name.startswith("re:")], cures


def _key_or_value(module: str, port: str, scale: torch.Tensor) -> TensorScale:
    """Of several heads the entry's own scale is the largest."""
    entry = _float8(port, module, port, float(scale.max()))
    if scale.numel() == 1:
        return entry
    scales = [float(number) for number in scale.reshape(-1)]
    ends = [number * FLOAT8_MAX for number in scales]
    heads = HeadScales(min=[-end for end in ends], max=ends, scale=scales, zero_point=[0] * len(scales))
    return entry.model_copy(update={"heads": heads})


def _checkpoint_linear(name: str, linear: CompressedLinear, *, floating: bool, symmetric: bool) -> Tensors:
    weight = linear.codes.float() * linear.weight_scale
    ends = float(weight.min()), float(weight.max())
    rows = [float(scale) for scale in linear.weight_scale.reshape(-1)]
    if floating:
        entry = _float8("linear_input", name, "input", linear.input_scale)
        return {f"{name}:input": entry, f"{name}:weight": _weight(name, rows, ends, -448, 448, 448.0, "float")}
    if symmetric:
        entry = _symmetric("linear_input", name, "input", linear.input_scale, -128, 127, 127.5)
    else:
        entry = _asymmetric(name, linear.input_scale, linear.input_zero_point, single=True)
    return {f"{name}:input": entry, f"{name}:weight": _weight(name, rows, ends, -128, 127, 127.5)}


def _from_onnx(file: Path) -> Tensors:
    read = read_onnx(file)
    if read.problems:
        raise ArtifactError(f"{file}: {read.problems[0]}; correct it, or pass another export")
    tensors: Tensors = {}
    for name, linear in read.linears.items():
        tensors |= _onnx_linear(name, linear)
    return tensors


def _onnx_linear(name: str, linear: QdqLinear) -> Tensors:
    module, _, call = name.partition("#")
    port = f"input#{call}" if call else "input"
    point = linear.zero_point - (128 if linear.qmin == 0 else 0)  # uint8 codes, moved to -128..127
    weight = linear.codes.astype(np.float32) * linear.weight_scale
    rows = [float(scale) for scale in np.broadcast_to(linear.weight_scale, linear.codes.shape[1])]
    entry = _signed(module, linear.scale, point, symmetric=point == 0)
    ends = float(weight.min()), float(weight.max())
    return {f"{module}:{port}": entry, f"{module}:weight": _weight(module, rows, ends, -127, 127, 127.0)}


def _from_aimet(file: Path, beside: ScaleFile | None) -> Tensors:
    """Encodings under our names where a scale file beside knows them, else under those of the graph."""
    names: dict[str, list[str]] = {}
    for ours, there in (beside.aliases.get("onnx", {}) if beside is not None else {}).items():
        names.setdefault(there, []).append(ours)
    tensors: Tensors = {}
    for one in read_aimet(file).values():
        port = "weight" if one.parameter else "input"
        for name in names.get(one.name, [f"{one.name}:{port}"]):
            tensors[name] = _aimet_tensor(name, one)
    return tensors


def _aimet_tensor(name: str, one: Encoding) -> TensorScale:
    module = name.rpartition(":")[0]
    if one.parameter:
        largest = max(one.scale) * 127
        return _weight(module, one.scale, (-largest, largest), -127, 127, 127.0)
    return _signed(module, one.scale[0], one.zero_point, symmetric=one.symmetric and one.zero_point == 0)


def _signed(module: str, scale: float, point: int, *, symmetric: bool) -> TensorScale:
    """The input of a linear layer in int8.

    ``symmetric``: 0 has the code 0. An asymmetric range can come to that as well; it is meant where no amax / 127
    equals the scale.
    """
    asymmetric = _asymmetric(module, scale, point)
    if not symmetric:
        return asymmetric
    amax = symmetric_range(scale, 127.0)
    reached = LinearRange(module, -amax, amax, symmetric=True).grid()[0] == scale
    fits = LinearRange(module, asymmetric.range_min, asymmetric.range_max, symmetric=False).grid() == (scale, point)
    if fits and not reached:
        return asymmetric
    return _symmetric("linear_input", module, "input", scale, -127, 127, 127.0)


def _symmetric(kind: str, module: str, port: str, scale: float, qmin: int, qmax: int, intervals: float) -> TensorScale:
    amax = symmetric_range(scale, intervals)
    formula = f"max(|range|)/{intervals:g}"
    return _tensor(kind, module, port, scale, 0, -amax, amax, qmin, qmax, formula, symmetric=True)


def _asymmetric(module: str, scale: float, point: int, *, single: bool = False) -> TensorScale:
    """``single``: the format takes the difference of the ends in float32, as compressed-tensors does."""

    def grid(low: float, high: float) -> tuple[float, int]:
        held = LinearRange(module, low, high, symmetric=False)
        return held.asymmetric_grid() if single else held.grid()

    low, high = asymmetric_range(scale, point, grid)
    formula = "(range_max - range_min)/255"
    return _tensor("linear_input", module, "input", scale, point, low, high, -128, 127, formula, symmetric=False)


def _float8(kind: str, module: str, port: str, scale: float) -> TensorScale:
    amax = symmetric_range(scale, 448.0)
    return _tensor(
        kind, module, port, scale, 0, -amax, amax, -448, 448, "max(|range|)/448", symmetric=True, dtype="float"
    )


def _weight(
    module: str,
    rows: list[float],
    ends: tuple[float, float],
    qmin: int,
    qmax: int,
    intervals: float,
    dtype: Literal["int", "float"] = "int",
) -> TensorScale:
    formula = f"max(|range|)/{intervals:g} of each row"
    return _tensor(
        "weight",
        module,
        "weight",
        rows,
        0,
        *ends,
        qmin,
        qmax,
        formula,
        symmetric=True,
        granularity="per-row",
        dtype=dtype,
    )


def _tensor(
    kind: str,
    module: str,
    port: str,
    scale: float | list[float],
    point: int,
    low: float,
    high: float,
    qmin: int,
    qmax: int,
    formula: str,
    *,
    symmetric: bool,
    granularity: Literal["per-tensor", "per-row"] = "per-tensor",
    dtype: Literal["int", "float"] = "int",
) -> TensorScale:
    return TensorScale(
        kind=kind,
        module=module,
        port=port,
        scheme=Scheme(bits=8, symmetric=symmetric, granularity=granularity, dtype=dtype),
        min=low,
        max=high,
        amax=max(abs(low), abs(high)),
        range_min=low,
        range_max=high,
        scale=scale,
        zero_point=point,
        qmin=qmin,
        qmax=qmax,
        formula=formula,
        method="imported",
        expected=_UNKNOWN,
        verdict="static",
        reason="imported; min and max are the ends of the range that the scale stands for",
    )


def _beside(folder: Path) -> ScaleFile | None:
    if not (folder / FILE_NAME).is_file():
        return None
    return load_scales(folder)


def _model(folder: Path, kind: str) -> ModelProvenance:
    """Where an export of another program came from, as far as its folder tells."""
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError:
            raise ArtifactError(f"{folder}: config.json is damaged; copy the export again") from None
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".onnx", ".encodings"))
    try:
        tokenizer = tokenizer_sha256(read_checkpoint(folder, folder.name).tokenizer_files)
    except CalibError:
        tokenizer = None
    config_file = folder / "config.json"
    return ModelProvenance(
        name=folder.name,
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        model_type=str(config.get("model_type", "unknown")),
        task="unknown",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "unknown"),
        parameters=0,
        source_format=f"imported:{kind}",
        config_sha256=sha256_of_file(config_file) if config_file.is_file() else hashlib.sha256(b"").hexdigest(),
        tokenizer_sha256=tokenizer,
        weights_sha256={path.name: sha256_of_file(path) for path in weights},
    )


def _no_corpus() -> CorpusProvenance:
    return CorpusProvenance(
        sources=[],
        layout="user",
        blocks=0,
        max_length=0,
        tokens=0,
        documents=0,
        domains=[],
        blocks_per_domain={},
        seed=0,
        add_bos=False,
        content_sha256=hashlib.sha256(b"").hexdigest(),
    )
