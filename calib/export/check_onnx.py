# SPDX-License-Identifier: Apache-2.0
"""Checks an `onnx-qdq` folder against its scale file, and runs it in ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calib.cures.restore import rounded_digests
from calib.cures.scale import recorded_factors
from calib.errors import ModelError
from calib.export.checks import checks, consumer
from calib.export.compare import largest_difference, paired_speed
from calib.export.linears import LinearRange, linear_ranges
from calib.export.onnx_emulate import float_twin, layer_model, layer_outputs, layer_rows, reference_output, token_feed
from calib.export.onnx_lint import integer_layers, session
from calib.export.onnx_qdq import FILE
from calib.export.read_onnx import QdqGraph, QdqLinear, read_onnx
from calib.export.report import ConsumerReport, Verification
from calib.quantized.rounded_file import rounded_sha256
from calib.schema.export import ExportManifest
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = ["check_onnx_qdq", "run_onnxruntime", "run_openvino"]

LAYER_ALLOWANCE = 2.0**-20
"""Of one layer, relative to its largest output: int32 sums are exact, what is left is one float32 multiplication and
addition, in another order."""
FLIPS, FLOOR = 3.0, 1e-3
"""Of the whole model: `FLOOR`, plus `FLIPS` times what a change of the embeddings by 1e-4 does to the quantized model.
A value between two codes takes the other one where sums before it were added in another order, and one code is 1/254 of
a range; how far that spreads depends on the model. ONNX Runtime differs as much from itself without optimisation."""


@checks("onnx-qdq")
def check_onnx_qdq(folder: Path, manifest: ExportManifest | None, scales: ScaleFile | None) -> Verification:
    """Every quantized product, and, with a scale file, its numbers."""
    read = read_onnx(_file(folder))
    found = Verification("onnx-qdq", read.scales - len(read.problems), read.scales, list(read.problems))
    modules = {name.partition("#")[0] for name in read.linears}
    if manifest is not None:
        missing = [name for name in manifest.quantized if name not in modules]
        found.scales += 2 * len(missing)
        found.problems += [f"{name}: is not quantized in the graph" for name in missing]
        found.problems += [
            f"{name}: is quantized, and was exported in float" for name in modules & {*manifest.in_float}
        ]
    elif not read.linears:
        found.problems.append(f"{FILE}: holds no quantized matrix product")
    if scales is not None:
        found.problems += _against_scales(read, scales)
    return found


@consumer(
    "onnxruntime",
    formats=("onnx-qdq",),
    packages=("onnx", "onnxruntime"),
    install="pip install 'calib[onnx]'",
)
def run_onnxruntime(folder: Path, manifest: ExportManifest | None, model: OpenedModel | None) -> ConsumerReport:
    """Each layer on its own, the whole graph, its speed, and which layers run in integers."""
    read = read_onnx(_file(folder))

    def layer(linear: QdqLinear, x: Any) -> Any:
        return session(layer_model(read, linear).SerializeToString(), threads=1).run(None, {linear.source: x})[0]

    whole, twin = session(_file(folder), threads=1), session(float_twin(read).SerializeToString(), threads=1)
    return _report(
        f"onnxruntime {version('onnxruntime')}",
        read,
        folder,
        layer,
        lambda feed: whole.run(None, feed)[0],
        lambda feed: twin.run(None, feed)[0],
        model,
        len(integer_layers(_file(folder))),
    )


@consumer(
    "openvino",
    formats=("onnx-qdq",),
    packages=("onnx", "onnxruntime", "openvino"),
    install="pip install 'calib[onnx,openvino]'",
)
def run_openvino(folder: Path, manifest: ExportManifest | None, model: OpenedModel | None) -> ConsumerReport:
    """The same in OpenVINO, on one thread, with float32 for what is not quantized."""
    from calib.export.openvino_run import compiled, integer_products

    read = read_onnx(_file(folder))
    whole, twin = compiled(_file(folder)), compiled(float_twin(read).SerializeToString())

    def layer(linear: QdqLinear, x: Any) -> Any:
        return compiled(layer_model(read, linear).SerializeToString())({linear.source: x})[0]

    return _report(
        f"openvino {version('openvino')}",
        read,
        folder,
        layer,
        lambda feed: whole(feed)[0],
        lambda feed: twin(feed)[0],
        model,
        integer_products(whole),
    )


def _report(
    name: str, read: QdqGraph, folder: Path, layer: Any, whole: Any, twin: Any, model: OpenedModel | None, integer: int
) -> ConsumerReport:
    exact, saturating, worst = 0, 0, 0.0
    for linear in read.linears.values():
        x = layer_rows(linear)
        output = layer(linear, x)
        difference = largest_difference(output, layer_outputs(linear, x))
        exact, worst = exact + (difference <= LAYER_ALLOWANCE), max(worst, difference)
        if difference > LAYER_ALLOWANCE:
            narrow = largest_difference(output, layer_outputs(linear, x, saturating=True))
            saturating += narrow <= LAYER_ALLOWANCE
    feed = token_feed(read, folder)
    reference, moved = reference_output(read, feed, model)
    difference = largest_difference(whole(feed), reference)
    feed = token_feed(read, folder, rows=1, tokens=128)
    return ConsumerReport(
        consumer=name,
        scales_read=read.scales - len(read.problems),
        scales=read.scales,
        layers_exact=exact,
        layers=len(read.linears),
        layer_difference=worst,
        model_difference=difference,
        allowance=round(FLOOR + FLIPS * moved, 6),
        integer_layers=integer,
        saturating_layers=saturating,
        speed=round(median(paired_speed(lambda: twin(feed), lambda: whole(feed))), 3),
    )


def _file(folder: Path) -> Path:
    path = folder / FILE
    return path if path.is_file() else next(iter(sorted(folder.glob("*.onnx"))), path)


def _against_scales(read: QdqGraph, scales: ScaleFile) -> Iterator[str]:
    try:
        wanted = linear_ranges(scales, fused=False)
    except ModelError as error:
        yield str(error)
        return
    digests, factors = rounded_digests(scales), recorded_factors(scales)
    for name, linear in read.linears.items():
        module = name.partition("#")[0]
        expected = wanted.ranges.get(module)
        if expected is None:
            yield f"{name}: is quantized, and the scale file has no range for it"
            continue
        scale, point = expected.grid()
        if (linear.scale, linear.zero_point) != (scale, point):
            yield (
                f"{name}:input: scale is {linear.scale:.9g} (zero point {linear.zero_point}), "
                f"the scale file gives {scale:.9g} ({point})"
            )
        if module in factors and not _multiplies(linear, factors[module]):
            yield f"{name}:input: is not multiplied by the factors of the scale file"
        if module in digests:
            codes, rows = torch.from_numpy(linear.codes.T.copy()), torch.from_numpy(linear.weight_scale.copy())
            if rounded_sha256(codes, rows) != digests[module]:
                yield f"{name}:weight: is not the one that was rounded with error compensation"
        else:
            yield from _nearest(name, linear, expected)


def _multiplies(linear: QdqLinear, factors: Mapping[str, float]) -> bool:
    wanted = np.ones(linear.codes.shape[0], np.float32)
    wanted[[int(channel) for channel in factors]] = [*factors.values()]
    return linear.factors is not None and np.array_equal(linear.factors, wanted)


def _nearest(name: str, linear: QdqLinear, expected: LinearRange) -> Iterator[str]:
    """What shows that a weight was not rounded to the nearest code of its grid."""
    record = expected.weight
    rows = record.scale if record is not None and record.scheme.bits == 8 else None
    if isinstance(rows, list) and not np.array_equal(linear.weight_scale, np.array(rows, np.float32)):
        yield f"{name}:weight: scales are not those of the scale file"
    largest = np.abs(linear.codes.astype(np.int16)).max(0)
    if ((largest < 127) & (largest > 0)).any():
        column = int(((largest < 127) & (largest > 0)).argmax())
        yield f"{name}:weight: codes of output {column} reach {largest[column]}, not 127; they are of another scale"
