# SPDX-License-Identifier: Apache-2.0
"""`choose_scales`: from a measurement to a scale file, without the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from calib import __version__
from calib.errors import ArtifactError, UsageError
from calib.scales.grid import Grid
from calib.scales.methods import parse_method
from calib.scales.routers import IN_FLOAT, router_layers
from calib.scales.selected import QUANTIZED_KINDS, Selected, is_quantized, select
from calib.scales.tensors import activation_scale, weight_scale
from calib.scales.verdict import Judgement, judge_model
from calib.schema.provenance import Producer
from calib.schema.scales import ScaleFile, TensorScale
from calib.statistics.observation import REST

if TYPE_CHECKING:
    from calib.measurement.artifact import Measurement
    from calib.measurement.site import Site

__all__ = ["choose_scales"]


def choose_scales(
    measurement: Measurement,
    *,
    bits: int = 8,
    method: str = "absmax",
    symmetric: bool = True,
    granularity: Literal["per-tensor", "per-channel"] = "per-tensor",
    weight_granularity: Literal["per-row", "per-tensor"] = "per-row",
    weight_method: str = "absmax",
    weight_symmetric: bool = True,
    sites: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    include_sink: bool = True,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> ScaleFile:
    """Chooses a scale for every measured tensor and says what error to expect.

    A tensor that several modules read has one entry, under its canonical name; the others are in `shared_with`.
    A tensor whose values are all 0, or below the smallest step that float32 can divide by, gets no entry, for no scale
    follows from its data: it is named in `left_out`, and modules that read it are listed in `ignore`. So are the linear
    layers of routers, their weights and what only they read.

    Args:
        measurement: of a model on a corpus.
        bits: of activations and weights, 2 to 16.
        method: for activations, ``name`` or ``name:number``; `calib methods` lists them.
        symmetric: grid of activations. Per-channel scales always span the channel's min and max.
        granularity: one scale per site, or one per channel of it.
        weight_granularity: one scale per output row, or one per weight.
        weight_method: for weights with one scale; rows always span their min and max.
        weight_symmetric: grid of weights; consumers of INT8 require True.
        sites: patterns of tensors wanted; all if absent.
        ignore: patterns of tensors left in floating point.
        include_sink: whether the first positions of a block count. False where they will not be quantized, as behind a
            prefix that stays in float.
        limits: canonical site name -> lowest and highest value that its grid, one for the whole site, reaches to. What
            lies beyond is clipped, and counts as that in the expected error.

    Raises:
        UsageError: bits, method, granularity or a pattern is invalid.
        ArtifactError: the measurement lacks what the method needs.
        GateError: a tensor held NaN or infinite values, or was never reached.
    """
    grid, weight_grid = Grid(bits, symmetric), Grid(bits, weight_symmetric)
    chosen, weight_chosen = parse_method(method), parse_method(weight_method)
    _check_granularity(granularity, ("per-tensor", "per-channel"), chosen.label)
    _check_granularity(weight_granularity, ("per-row", "per-tensor"), weight_chosen.label)
    if not include_sink and not measurement.run.sink_positions:
        raise UsageError("include_sink=False: no positions were kept apart; measure with --sink-positions 1 or more")
    routers = _router_tensors(measurement)
    selected = select(measurement if include_sink else _without_sink(measurement), sites, ignore).without(routers)

    tensors: dict[str, TensorScale] = {}
    zero: list[str] = []
    per_channel = granularity == "per-channel"
    for name, site in selected.sites.items():
        if per_channel and site.statistics.channels is None:
            raise ArtifactError(f"{name}: its channels were not measured; use per-tensor, or measure all statistics")
        limit = None if limits is None else limits.get(site.name)
        scale = activation_scale(name, site, chosen, grid, per_channel=per_channel, limit=limit)
        if scale is None:
            zero.append(name)
        else:
            tensors[name] = scale
    for name, weight in selected.weights.items():
        scale = weight_scale(name, weight, weight_chosen, weight_grid, per_row=weight_granularity == "per-row")
        if scale is None:
            zero.append(name)
        else:
            tensors[name] = scale

    judgement = _judge(selected, tensors)
    return ScaleFile(
        producer=Producer(version=__version__),
        model=measurement.model,
        corpus=measurement.corpus,
        measurement_sha256=measurement.sha256,
        method=chosen.label,
        bits=bits,
        tensors=tensors,
        coverage=dict(sorted(Counter(tensor.kind for tensor in tensors.values()).items())),
        gates={gate.name: gate.passed for gate in measurement.gates},
        ignore=_modules_in_float(measurement, [*selected.ignored, *routers, *zero]),
        left_out=dict.fromkeys(routers, IN_FLOAT)
        | dict.fromkeys(selected.ignored, "ignored on request")
        | dict.fromkeys(zero, "all of its values are 0, or nearly so: no scale follows from the data"),
        verdict=judgement.verdict,
        reason=judgement.reason,
    )


def _without_sink(measurement: Measurement) -> Measurement:
    sites = {n: replace(s, statistics=s.statistics.of(REST)) for n, s in measurement.sites.items()}
    return replace(measurement, sites=sites)


def _check_granularity(granularity: str, valid: tuple[str, ...], method: str) -> None:
    if granularity not in valid:
        raise UsageError(f"granularity '{granularity}': unknown here; choose one of {', '.join(valid)}")
    if granularity != "per-tensor" and method not in ("absmax", "percentile:100"):
        raise UsageError(f"method {method}: {granularity} scales span min and max; use absmax, or per-tensor")


def _judge(selected: Selected, tensors: dict[str, TensorScale]) -> Judgement:
    counted = [name for name, site in selected.sites.items() if is_quantized(site)]
    counted += list(selected.weights)
    judged = [(name, Judgement(tensors[name].verdict, tensors[name].reason)) for name in counted if name in tensors]
    return judge_model(judged)


def _router_tensors(measurement: Measurement) -> list[str]:
    """Weights of routers, and activations that a deployment would quantize for nothing but a router."""
    sites = measurement.sites.values()
    modules = [name.partition(":")[0] for site in sites for name, kind in _names(site).items() if kind == "router"]
    layers = router_layers(modules, {weight.module for weight in measurement.weights.values()})
    found = [name for name, weight in measurement.weights.items() if weight.module in layers]
    for name, site in measurement.sites.items():
        readers = [n.partition(":")[0] for n, kind in _names(site).items() if kind in QUANTIZED_KINDS]
        if readers and layers.issuperset(readers):
            found.append(name)
    return found


def _names(site: Site) -> dict[str, str]:
    """Every name of a tensor, and its kind under that name."""
    return {site.name: site.kind, **site.aliases}


def _modules_in_float(measurement: Measurement, names: list[str]) -> list[str]:
    """Modules whose weight or linear input is among these tensors, once each, in order."""
    modules: dict[str, None] = {}
    for name in names:
        if name in measurement.weights:
            modules[measurement.weights[name].module] = None
        else:
            kinds = _names(measurement.sites[name]).items()
            modules |= dict.fromkeys(reader.partition(":")[0] for reader, kind in kinds if kind == "linear_input")
    return list(modules)
