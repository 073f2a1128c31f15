# SPDX-License-Identifier: Apache-2.0
"""Writes and reads statistics in the authors' own files, `NAME_activation_stats.json` and `NAME_top5_stats.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from calib import __version__
from calib.errors import ArtifactError
from calib.measurement.artifact import Measurement
from calib.measurement.site import Site
from calib.protocols.max_activations import joined, measured_rows
from calib.protocols.paper_sites import MAXIMUM_KINDS, PaperSite, paper_sites
from calib.protocols.rows import CheckpointMaximum, SiteRow
from calib.schema.activation_stats import ActivationStatsFile, ProtocolProvenance, SiteStats, TopValues, TopValuesFile
from calib.schema.provenance import Producer
from calib.statistics import TokenRatio
from calib.statistics.ratios import MASSIVE_MAGNITUDE, MASSIVE_RATIO

__all__ = ["file_stem", "provenance", "read_activation_stats", "write_activation_stats", "write_record"]


def write_activation_stats(measurement: Measurement, folder: Path) -> list[Path]:
    """Writes both files into a folder and returns their paths.

    Raises:
        GateError, UsageError: see `max_activations.compare_maxima`.
        ArtifactError: a file cannot be written.
    """
    rows = {row.site: row for row in measured_rows(measurement)}
    named = {site: joined(held) for site, held in paper_sites(measurement).items() if site in rows}
    top = CheckpointMaximum.of(rows.values())
    corpus, any_row = measurement.corpus, next(iter(rows.values()))
    header: dict[str, Any] = {
        "model_name": file_stem(measurement),
        "model_path": measurement.model.name,
        "model_type": measurement.model.model_type,
        "num_hidden_layers": any_row.num_hidden_layers,
        "hidden_size": any_row.hidden_size,
        "data_path": ", ".join(source.name for source in corpus.sources),
        "num_samples": corpus.blocks,
        "max_seq_len": corpus.max_length,
        "calib": provenance(measurement),
    }
    stats = ActivationStatsFile(
        **header,
        global_max_activation=top.value,
        global_max_location=f"{top.site} ({'max' if top.value > 0 else 'min'})",
        per_layer_stats={site.name: _stats(rows[site], one) for site, one in named.items()},
    )
    peaks = {site.name: _top_values(one) for site, one in named.items() if site.kind in MAXIMUM_KINDS}
    # not pooled over layers, as the authors do: neighbouring layers hold the same few activations again
    largest = peaks[top.site]
    values = TopValuesFile(
        **header,
        global_top5_abs=largest.topk_abs,
        global_top5_signed=largest.topk_signed,
        global_top5_abs_mean=largest.topk_abs_mean,
        per_layer_stats=peaks,
    )
    stem = file_stem(measurement)
    return [
        write_record(stats, folder / f"{stem}_activation_stats.json"),
        write_record(values, folder / f"{stem}_top5_stats.json"),
    ]


def read_activation_stats(path: Path, family: str | None = None) -> list[SiteRow]:
    """The rows of such a file, the authors' or ours.

    Args:
        path: of the file.
        family: of the checkpoint, which the file does not hold; its `model_type` if absent.

    Raises:
        ArtifactError: it cannot be read, or is no such file.
    """
    try:
        file = ActivationStatsFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
        sites = {PaperSite.parse(name): stats for name, stats in file.per_layer_stats.items()}
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: is no JSON ({error}); copy it again") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}; pass a file NAME_activation_stats.json") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: site {error} is no published name; pass NAME_activation_stats.json") from error
    return [
        SiteRow(
            checkpoint=file.model_name,
            family=family or file.model_type,
            model_type=file.model_type,
            num_hidden_layers=file.num_hidden_layers,
            hidden_size=file.hidden_size,
            site=site,
            min=stats.min,
            max=stats.max,
            mean=stats.mean,
            std=stats.std,
            rms=stats.rms,
            abs_mean=stats.abs_mean,
            abs_median=stats.abs_median,
            abs_q99=stats.abs_q99,
            abs_q999=stats.abs_q999,
            count=stats.count,
            massive_tokens=None if stats.sun_n_pass is None else int(stats.sun_n_pass),
        )
        for site, stats in sites.items()
    ]


def file_stem(measurement: Measurement) -> str:
    """Name of a model as a part of a file name: what follows the last slash, without ``.gguf``."""
    return Path(measurement.model.name).name.removesuffix(".gguf") or "model"


def provenance(measurement: Measurement) -> ProtocolProvenance:
    """What the published fields leave out."""
    return ProtocolProvenance(
        producer=Producer(version=__version__),
        measurement_sha256=measurement.sha256,
        model_fingerprint=measurement.model.fingerprint,
        dtype=measurement.run.dtype,
        attention=measurement.run.attention,
        sites={site.name: [one.name for one in held] for site, held in paper_sites(measurement).items()},
    )


def write_record(record: BaseModel, path: Path) -> Path:
    """Writes one JSON file, whole or not at all; fields that do not apply are left out."""
    text = json.dumps(record.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False, allow_nan=False)
    work = path.with_name(f".{path.name}.part")
    try:
        work.write_text(text + "\n", encoding="utf-8")
        os.replace(work, path)  # noqa: PTH105 - one call that overwrites on every system
    except OSError as error:
        work.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot be written ({error.strerror}); free some space, or check rights"
        ) from error
    return path


def _stats(row: SiteRow, site: Site) -> SiteStats:
    values: dict[str, Any] = {
        name: getattr(row, name) for name in ("mean", "std", "abs_mean", "rms", "max", "min", "count")
    }
    histogram = site.statistics.histogram
    if row.site.kind not in MAXIMUM_KINDS or histogram is None:
        return SiteStats(**values)
    shares = {"abs_q25": 0.25, "abs_median": 0.5, "abs_q75": 0.75, "abs_q90": 0.9, "abs_q99": 0.99, "abs_q999": 0.999}
    values |= dict(zip(shares, histogram.quantiles_abs(list(shares.values())), strict=True))
    numbers, counts, _, _ = histogram.combined()
    values["abs_hist_count"] = row.count
    values["abs_hist_zero_frac"] = float(counts[numbers == 0].sum()) / row.count
    return SiteStats(**values, **_sun(site.statistics.ratios))


def _sun(ratios: TokenRatio | None) -> dict[str, Any]:
    if ratios is None:
        return {}
    peak, its_median = ratios.peak
    top, other_median = ratios.steepest
    return {
        "sun_peak_abs": peak,
        "sun_peak_token_median": its_median,
        "sun_peak_token_ratio": peak / its_median if its_median > 0 else None,
        "sun_max_ratio": top / other_median if other_median > 0 else None,
        "sun_max_ratio_abs": top,
        "sun_max_ratio_median": other_median,
        "sun_mean_ratio": ratios.mean,
        "sun_std_ratio": ratios.std,
        "sun_n_tokens": float(ratios.tokens.sum()),
        "sun_n_pass": float(ratios.passed.sum()),
        "sun_t_val": MASSIVE_MAGNITUDE,
        "sun_t_ratio": MASSIVE_RATIO,
    }


def _top_values(site: Site) -> TopValues:
    peaks = site.statistics.peaks
    signed = [] if peaks is None else [float(v) for v in peaks.value]
    absolute, count = [abs(v) for v in signed], max(len(signed), 1)
    return TopValues(
        topk_abs=absolute,
        topk_signed=signed,
        top_k=len(signed),
        topk_abs_mean=sum(absolute) / count,
        topk_signed_mean=sum(signed) / count,
    )
