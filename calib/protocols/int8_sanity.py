# SPDX-License-Identifier: Apache-2.0
"""The INT8 sanity check of arXiv 2605.15572: one tensor, two thresholds, errors pooled over all of its values.

The paper takes its thresholds from some rows of text and quantizes other rows. Here `calibration` may be a measurement
of other rows; without it the thresholds and the errors are of the same values, so that nothing exceeds `max_abs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib.errors import ArtifactError, UsageError
from calib.measurement.artifact import Measurement
from calib.protocols.activation_stats import file_stem, provenance, write_record
from calib.protocols.max_activations import joined, measured_rows
from calib.protocols.paper_sites import PaperSite, paper_sites
from calib.protocols.published import SanityRow
from calib.protocols.rows import CheckpointMaximum
from calib.scales import Distribution
from calib.scales.error import side_errors
from calib.scales.grid import SMALLEST_SCALE
from calib.schema.activation_stats import QuantSanityFile, QuantSanityMetrics

__all__ = ["PROTOCOL", "Sanity", "int8_sanity", "linear_quantile", "write_sanity"]

PROTOCOL = "int8-sanity"
_BITS, _LEVELS, _QUANTILE = 8, 127, 0.999
_LINEAR_BINS = 2048


@dataclass(frozen=True)
class Sanity:
    """Result of the check.

    Attributes:
        maximum: M of the measurement, which names the site.
        rows: per site three policies: ``max_abs``, ``clip_q0.999`` (the true quantile) and ``clip_q0.999_linear``
            (the quantile as a histogram of 2,048 equal bins finds it, which is how the published one was made).
        held_out: thresholds come from other rows than those that were quantized.
    """

    maximum: CheckpointMaximum
    rows: list[SanityRow]
    held_out: bool


def int8_sanity(
    measurement: Measurement, sites: Sequence[str] = (), *, calibration: Measurement | None = None
) -> Sanity:
    """Static symmetric per-tensor INT8, ``s = t / 127``, ``q = clamp(round(clamp(x, -t, t) / s), -127, 127)``.

    Errors follow from the histogram: exact for bfloat16 tensors.

    Args:
        measurement: of the rows that are quantized, with histograms.
        sites: published names or names of sites; the one site that holds M if there are none.
        calibration: of the rows that give the thresholds; `measurement` itself if absent.

    Raises:
        UsageError: a site is not there, or a measurement holds ranges only.
        ArtifactError: `calibration` is of another model, or lacks a site.
        GateError: no output of a block was measured.
    """
    source = measurement if calibration is None else calibration
    if source.model.fingerprint != measurement.model.fingerprint:
        raise ArtifactError(
            f"{source.model.name}: thresholds of another model than {measurement.model.name}; measure both"
        )
    maximum = CheckpointMaximum.of(measured_rows(measurement))
    rows = []
    for name in sites or (maximum.site,):
        values, giver = _distribution(measurement, name), _distribution(source, name)
        if giver.amax / _LEVELS < SMALLEST_SCALE:
            raise UsageError(f"{name}: all values are 0 or denormal, no scale exists; choose another site")
        thresholds = {
            "max_abs": giver.amax,
            "clip_q0.999": giver.body_limit,
            "clip_q0.999_linear": linear_quantile(giver),
        }
        rows += [
            _row(measurement, source, name, policy, values, t)
            for policy, t in thresholds.items()
            if t / _LEVELS >= SMALLEST_SCALE
        ]
    return Sanity(maximum, rows, calibration is not None)


def linear_quantile(distribution: Distribution, share: float = _QUANTILE, bins: int = _LINEAR_BINS) -> float:
    """A quantile of abs(x) as a histogram of equal bins from 0 to the largest magnitude finds it.

    It is the lower edge ``t_max * i / (bins - 1)`` of the first bin i at which the running count reaches the share:
    where one value is thousands of times larger than most, bin 0 or 1, which has little to do with the quantile.
    """
    side, top = distribution.folded, distribution.amax
    index = np.minimum(np.floor(side.centre / top * (bins - 1)), bins - 1).astype(np.int64)
    counts = np.bincount(index, weights=side.count, minlength=bins)
    counts[0] += distribution.zeros
    reached = np.cumsum(counts)
    found = int(np.searchsorted(reached, math.ceil(share * distribution.count - 1e-9)))
    return top * min(found, bins - 1) / (bins - 1)


def write_sanity(measurement: Measurement, sanity: Sanity, folder: Path) -> Path:
    """Writes `NAME_quant_sanity.json` in the authors' fields.

    Raises:
        ArtifactError: it cannot be written.
    """
    maximum, first = sanity.maximum, sanity.rows[0]
    thresholds: dict[str, dict[str, float]] = {}
    for row in sanity.rows:
        thresholds.setdefault(row.policy, {})[row.site] = row.threshold
    selected = list(dict.fromkeys(row.site for row in sanity.rows))
    record = QuantSanityFile(
        model_name=file_stem(measurement),
        family=maximum.family,
        model_path=measurement.model.name,
        data_path=", ".join(source.name for source in measurement.corpus.sources),
        bits=_BITS,
        clip_quantile=_QUANTILE,
        calibration_samples=first.calibration_samples,
        eval_samples=first.eval_samples,
        max_seq_len=measurement.corpus.max_length,
        layer_policy="peak" if selected == [maximum.site] else "listed",
        selected_layers=selected,
        reference_global_max_abs=maximum.magnitude,
        reference_global_max_location=f"{maximum.site} ({'max' if maximum.value > 0 else 'min'})",
        thresholds=thresholds,
        metrics=[
            QuantSanityMetrics(
                layer=row.site,
                **{k: getattr(row, k) for k in QuantSanityMetrics.model_fields if k != "layer"},
            )
            for row in sanity.rows
        ],
        calib=provenance(measurement),
    )
    return write_record(record, folder / f"{file_stem(measurement)}_quant_sanity.json")


def _distribution(measurement: Measurement, name: str) -> Distribution:
    """Of a site by its published name, its own or an alias."""
    published = {site.name: held for site, held in paper_sites(measurement).items()}
    held = published.get(name) or [s for s in measurement.sites.values() if name in (s.name, *s.aliases)]
    if not held:
        raise UsageError(
            f"{name}: no such site in this measurement; pass a published name like {PaperSite('hidden', 0).name}, "
            "or one that `calib sites MODEL` lists"
        )
    site = joined(held)
    histogram = site.statistics.histogram
    if histogram is None:
        raise UsageError(f"{measurement.model.name}: measured with --statistics ranges; measure again with full ones")
    return Distribution.of(histogram, site.statistics.range, site.dtype)


def _row(
    measurement: Measurement, source: Measurement, name: str, policy: str, values: Distribution, threshold: float
) -> SanityRow:
    scale = float(np.float32(threshold / _LEVELS))
    side = values.folded
    # both clamps saturate at t, give or take the rounding of s; what is beyond t is counted apart
    sums = side_errors(side, scale, _LEVELS, body=values.body_size(side))
    error = sums.of(values)
    count = max(values.count, 1)
    rmse = math.sqrt((sums.body + sums.peak) / count)
    return SanityRow(
        checkpoint=measurement.model.name,
        bits=_BITS,
        clip_quantile=_QUANTILE,
        calibration_samples=_samples(source),
        eval_samples=_samples(measurement),
        site=name,
        policy=policy,
        threshold=threshold,
        count=values.count,
        mae=sums.absolute / count,
        rmse=rmse,
        rel_mae=error.rel_mae or 0.0,
        rel_rmse=rmse / math.sqrt(values.energy / count) if values.energy > 0 else 0.0,
        sqnr_db=error.sqnr_db,
        clip_rate=max(0.0, side.total - side.count_below(threshold)) / count,
        body_sqnr_db=error.body_sqnr_db,
        zeroed=error.zeroed,
    )


def _samples(measurement: Measurement) -> int:
    """Rows of text that were run."""
    run, rows = measurement.run, measurement.corpus.blocks
    return min(len(run.batches) * run.batch_size, rows)
