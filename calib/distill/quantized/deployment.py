# SPDX-License-Identifier: Apache-2.0
"""What a student is worth once it is quantized: measured, scales chosen, judged on test data."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calib import __version__
from calib.distill.task import Task
from calib.measurement import Calibration, Measurement
from calib.measurement.weights import measure_weights
from calib.models.evaluating import evaluating
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, WeightScheme, plan_from_scales
from calib.scales import choose_scales
from calib.schema.distill import Deployment, QuantizedAccuracy, SitePeak
from calib.schema.provenance import CorpusProvenance, ModelProvenance, RunProvenance
from calib.schema.scales import ScaleFile

__all__ = ["Deployed", "deploy", "measure_classifier", "worst_peaks"]

_WORST = 3


@dataclass(frozen=True)
class Deployed:
    """The record of a deployment, and the scales that it was judged with."""

    record: Deployment
    scales: ScaleFile


def deploy(
    model: nn.Module,
    task: Task,
    calibration: Iterable[Any],
    test: Iterable[Any],
    *,
    name: str = "student",
    learned: QuantizationPlan | None = None,
    weight_bits: tuple[int, ...] = (8, 4),
) -> Deployed:
    """Measures a classifier, chooses scales, and counts what is still right when it computes with them.

    Activations are INT8, static, one symmetric scale per tensor by absmax; weights have one scale per output row.

    Args:
        model: trained; comes back as it was.
        task: how it reads a batch.
        calibration: training samples, to choose scales from.
        test: samples to judge by; nothing is chosen on them.
        name: of the model.
        learned: the plan that it was trained for, if it was; judged as well.
        weight_bits: of weights, a row each.

    Raises:
        GateError: a tensor held NaN or infinite values, or was never reached.
        ModelError: nothing can be quantized.
    """
    measurement = measure_classifier(model, task, calibration, name)
    scales = choose_scales(measurement)
    exact = _accuracy(model, task, test)
    rows = []
    plan = plan_from_scales(model, scales)
    for bits in weight_bits:
        # the scales of the file are for 8 bits; other widths take the extremes of each row
        of_width = plan if bits == 8 else plan.with_weights(dict.fromkeys(plan.weights, _scheme(bits)))
        rows.append(_quantized(model, task, test, of_width, bits, "measured"))
    if learned is not None:
        rows.append(_quantized(model, task, test, learned, _bits(learned), "learned"))
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {str(bits): _bytes(model, plan, bits) for bits in weight_bits}
    record = Deployment(
        peaks=worst_peaks(measurement, _WORST),
        mean_peak=_mean_peak(measurement),
        accuracy=exact,
        quantized=rows,
        left_in_float=dict(plan.left_out),
        float_bytes=4 * total,
        bytes_by_weight_bits=sizes,
    )
    return Deployed(record, scales)


def measure_classifier(model: nn.Module, task: Task, loader: Iterable[Any], name: str) -> Measurement:
    """All statistics of a classifier over labelled batches, as `calib measure` takes them; padding does not count.

    Args:
        model: in any mode.
        task: how it reads a batch.
        loader: batches.
        name: of the model, for its provenance.
    """
    batches = samples = 0
    with torch.no_grad(), evaluating(model), Calibration(model, sink_positions=0) as calibration:
        for batch in loader:
            samples += len(task.decide(model, batch).labels)
            batches += 1
    threads = torch.get_num_threads()
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    return Measurement(
        sites=calibration.sites(),
        weights=measure_weights(model, threads=threads),
        model=ModelProvenance(
            name=name,
            architecture=type(model).__name__,
            model_type="module",
            task=task.name,
            dtype=dtype,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            source_format="memory",
            config_sha256=hashlib.sha256(repr(model).encode()).hexdigest(),
            weights_sha256={"memory": digest.hexdigest()},
        ),
        corpus=CorpusProvenance(
            sources=[],
            layout="user",
            blocks=samples,
            max_length=0,
            tokens=0,
            documents=samples,
            domains=[],
            blocks_per_domain={},
            seed=0,
            add_bos=False,
            content_sha256="",
        ),
        run=RunProvenance(
            command="calib distill",
            device=first.device.type,
            dtype=dtype,
            batch_size=0,
            batches=list(range(batches)),
            planned_batches=batches,
            sink_positions=0,
            kernel=calibration.kernel_name,
            threads=threads,
            sites_pattern=[],
            ignore_pattern=[],
            versions={"calib": __version__, "python": platform.python_version(), "torch": str(torch.__version__)},
        ),
        gates=calibration.gates(),
    )


def worst_peaks(measurement: Measurement, count: int) -> list[SitePeak]:
    """The sites with the largest max|A| / rms(A), worst first."""
    found = []
    for name, site in measurement.sites.items():
        seen = site.statistics.range
        if seen.rms:
            found.append(SitePeak(site=name, kind=site.kind, amax=seen.amax, peak_over_rms=seen.amax / seen.rms))
    return sorted(found, key=lambda peak: -peak.peak_over_rms)[:count]


def _mean_peak(measurement: Measurement) -> float:
    peaks = worst_peaks(measurement, len(measurement.sites))
    return sum(peak.peak_over_rms for peak in peaks) / len(peaks)


def _accuracy(model: nn.Module, task: Task, loader: Iterable[Any]) -> float:
    right = total = 0
    with torch.no_grad(), evaluating(model):
        for batch in loader:
            decisions = task.decide(model, batch)
            right += int((decisions.logits.argmax(-1) == decisions.labels).sum())
            total += len(decisions.labels)
    return right / total


def _quantized(
    model: nn.Module, task: Task, test: Iterable[Any], plan: QuantizationPlan, bits: int | None, scales: Any
) -> QuantizedAccuracy:
    with QuantizedModel(model, plan):
        accuracy = _accuracy(model, task, test)
    return QuantizedAccuracy(weight_bits=bits, activation_bits=8, scales=scales, accuracy=accuracy)


def _scheme(bits: int) -> WeightScheme:
    return WeightScheme(IntegerGrid.of(bits))


def _bits(plan: QuantizationPlan) -> int | None:
    """Bits of the weights of a plan; None in float."""
    for scheme in plan.weights.values():
        if isinstance(scheme, WeightScheme) and scheme.grid is not None:
            return (scheme.grid.qmax + 1).bit_length()
    return None


def _bytes(model: nn.Module, plan: QuantizationPlan, bits: int) -> int:
    """Weights that are quantized at their width, a float32 scale for each output row, the rest in float32."""
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    for name in plan.weights:
        weight = model.get_submodule(name).get_parameter("weight")
        total += (weight.numel() * bits + 7) // 8 - 4 * weight.numel() + 4 * weight.shape[0]
    return total
