# SPDX-License-Identifier: Apache-2.0
"""Checks of the formats that are tables, graphs with a table beside them, or checkpoints that nothing here can run.

Every number that follows from the scale file is derived from it again, so that whatever is missing, added, exchanged or
no number is found. Sums and largest values of channels do not follow from it; of them, names and hashes are checked.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import CalibError
from calib.export.aimet import FILE as AIMET
from calib.export.checks import checks
from calib.export.csv_table import FILE as CSV
from calib.export.csv_table import export_csv
from calib.export.imatrix import FILES
from calib.export.linears import linear_ranges
from calib.export.ort_calibration import OVERRIDES, tensor_ranges
from calib.export.read_aimet import read_aimet
from calib.export.report import Verification
from calib.export.request import ExportRequest
from calib.export.safetensors_folder import SafetensorsFolder
from calib.export.sglang_kv import FILE as SGLANG
from calib.export.sglang_kv import export_sglang_kv
from calib.export.smoothquant import FILES as SMOOTHQUANT
from calib.export.table import check_against_ranges
from calib.schema.export import ExportManifest
from calib.schema.scales import ScaleFile

__all__ = ["check_aimet", "check_csv", "check_imatrix"]


@checks("aimet")
def check_aimet(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every encoding, by the names that the scale file gives to tensors of the graph."""
    found = Verification("aimet")
    held = read_aimet(folder / AIMET)
    if scales is None:
        return found
    graph = scales.aliases.get("onnx", {})
    groups: dict[str, list[str]] = {}
    for name, there in graph.items():
        if name.endswith(":input"):
            groups.setdefault(there, []).append(name.removesuffix(":input"))
    ranges = linear_ranges(scales, fused=False).ranges
    wanted: dict[str, tuple[float, int]] = {}
    for there, modules in groups.items():
        grids = {ranges[m].grid() for m in modules if m in ranges}
        if len(grids) == 1:
            wanted[there] = grids.pop()
    inputs = {name: (one.scale[0], one.zero_point) for name, one in held.items() if name in groups}
    check_against_ranges(found, inputs, {n: (float(np.float32(s)), p) for n, (s, p) in wanted.items()})
    for name, there in graph.items():
        if name.endswith(":weight"):
            _check_rows(found, name, held[there].scale if there in held else None, scales)
    return found


@checks("ort-calibration")
def check_ort(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every override, by the names that the scale file gives to tensors of the graph."""
    found = Verification("ort-calibration")
    content = _json(folder / OVERRIDES, found)
    if scales is None or content is None:
        return found
    ranges = tensor_ranges(scales.aliases.get("onnx", {}), linear_ranges(scales, fused=False).ranges)
    wanted = {name: found.grid() for name, found in ranges.items()}
    try:
        held = {str(name): (float(one["scale"]), int(one["zero_point"])) for name, one in content.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        found.problems.append(f"{OVERRIDES}: is damaged")
        return found
    return check_against_ranges(found, held, wanted)


@checks("csv")
def check_csv(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every row, against a table that is written again."""
    return _written_again(folder, CSV, scales, export_csv, "csv")


@checks("sglang-kv")
def check_sglang(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every layer, against a file that is written again."""
    return _written_again(folder, SGLANG, scales, export_sglang_kv, "sglang-kv")


@checks("quark")
def check_quark(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every scale of the checkpoint."""
    return _checkpoint(folder, manifest, scales, "quark", 127.5)


@checks("modelopt")
def check_modelopt(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every scale of the checkpoint."""
    return _checkpoint(folder, manifest, scales, "modelopt", 448.0)


@checks("imatrix")
def check_imatrix(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Names and finite sums, read by the gguf package."""
    found = Verification("imatrix")
    if manifest is None or scales is None or not (folder / FILES["gguf"]).is_file():
        return _hashes_only(found, manifest)
    import gguf

    try:
        held = {str(tensor.name): tensor.data for tensor in gguf.GGUFReader(folder / FILES["gguf"]).tensors}
    except (ValueError, OSError, IndexError, KeyError) as error:
        found.problems.append(f"{FILES['gguf']}: is damaged ({' '.join(str(error).split())})")
        return found
    for name in scales.aliases.get("gguf", {}).values():
        found.scales += 1
        sums, counts = held.pop(f"{name}.in_sum2", None), held.pop(f"{name}.counts", None)
        if sums is None or counts is None:
            found.problems.append(f"{name}: is missing")
        elif not (np.isfinite(sums).all() and (sums >= 0).all() and (counts > 0).all()):
            found.problems.append(f"{name}: holds no usable sums")
        else:
            found.scales_read += 1
    found.problems += [f"{name}: belongs to no weight that was exported" for name in held]
    return found


@checks("smoothquant")
def check_smoothquant(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Names and finite values."""
    found = Verification("smoothquant")
    if manifest is None or manifest.variant != "safetensors":
        return _hashes_only(found, manifest)
    tensors = SafetensorsFolder(folder, SMOOTHQUANT["safetensors"])
    found.problems += tensors.problems
    found.scales = len(manifest.quantized)
    for name in manifest.quantized:
        if name not in tensors:
            found.problems.append(f"{name}: is missing")
        elif not bool((tensors.tensor(name).isfinite() & (tensors.tensor(name) >= 0)).all()):
            found.problems.append(f"{name}: holds no usable range")
        else:
            found.scales_read += 1
    return found


@checks("openvino")
def check_openvino(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Hashes; `onnx-qdq`, of which it is a conversion, is checked number by number."""
    return _hashes_only(Verification("openvino"), manifest)


def _hashes_only(found: Verification, manifest: ExportManifest | None) -> Verification:
    if manifest is not None:
        found.scales = found.scales_read = len(manifest.quantized)
    found.not_checked.append("values: the scale file does not hold them, only hashes of files are compared")
    return found


def _check_rows(found: Verification, name: str, held: list[float] | None, scales: ScaleFile) -> None:
    record = scales.tensors.get(name)
    if record is None or not isinstance(record.scale, list):
        return
    found.scales += 1
    if held is None:
        found.problems.append(f"{name}: is missing")
    elif not np.array_equal(np.array(held, np.float32), np.array(record.scale, np.float32)):
        found.problems.append(f"{name}: scales are not those of the scale file")
    else:
        found.scales_read += 1


def _written_again(folder: Path, file: str, scales: ScaleFile | None, write: Any, name: str) -> Verification:
    found = Verification(name)
    if not (folder / file).is_file():
        found.problems.append(f"{file}: is missing")
    if scales is None or found.problems:
        return found
    with tempfile.TemporaryDirectory(prefix="calib-verify-") as again:
        try:
            found.scales = len(write(ExportRequest(scales, Path(again))).quantized)
        except CalibError as error:
            found.problems.append(str(error))
            return found
        right = (Path(again) / file).read_text(encoding="utf-8").splitlines()
    held = (folder / file).read_text(encoding="utf-8").splitlines()
    wrong = [n for n, (a, b) in enumerate(zip(held, right, strict=False), 1) if a != b]
    if len(held) != len(right):
        found.problems.append(f"{file}: has {len(held)} lines, must have {len(right)}")
    found.problems += [f"{file}: line {n} is not what the scale file gives" for n in wrong[:20]]
    found.scales_read = max(0, found.scales - len(wrong))
    return found


def _checkpoint(
    folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None, name: str, intervals: float
) -> Verification:
    tensors = SafetensorsFolder(folder)
    found = Verification(name, problems=list(tensors.problems))
    if scales is None or manifest is None:
        return found
    ranges = linear_ranges(scales).ranges
    wanted = {f"{m}.input_scale": (ranges[m].symmetric_scale(intervals), 0) for m in manifest.quantized if m in ranges}
    held = {n: (float(tensors.tensor(n).reshape(-1)[0]), 0) for n in tensors.names if n.endswith(".input_scale")}
    check_against_ranges(found, held, wanted)
    found.problems += list(_weight_scales(tensors, manifest))
    return found


def _weight_scales(tensors: SafetensorsFolder, manifest: ExportManifest) -> Iterator[str]:
    for module in manifest.quantized:
        name = f"{module}.weight_scale"
        if name not in tensors:
            yield f"{name}: is missing"
        elif not bool((tensors.tensor(name).isfinite() & (tensors.tensor(name) > 0)).all()):
            yield f"{name}: holds no usable scale"


def _json(path: Path, found: Verification) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found.problems.append(f"{path.name}: is missing or damaged")
        return None
