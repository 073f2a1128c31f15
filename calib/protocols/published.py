# SPDX-License-Identifier: Apache-2.0
"""The published numbers, as facts: 27 checkpoints site by site, and the INT8 sanity check of 8 of them.

Source: "Measuring Maximum Activations in Open LLMs", arXiv 2605.15572, and its public repository
clx1415926/Max_act_llm, from whose result files the two tables in this folder were taken over.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from importlib.resources import files

from calib.protocols.paper_sites import PaperSite
from calib.protocols.rows import CheckpointMaximum, SiteRow

__all__ = ["SOURCE", "SanityRow", "published_maxima", "published_rows", "published_sanity"]

SOURCE = "arXiv 2605.15572, github.com/clx1415926/Max_act_llm"


@dataclass(frozen=True)
class SanityRow:
    """One policy of the INT8 sanity check on one tensor.

    Attributes:
        checkpoint: name of the model.
        bits: of the grid.
        clip_quantile: of abs(x), for the policies that clip.
        calibration_samples, eval_samples: rows of text that gave the threshold, and that were quantized.
        site: published name of the tensor.
        policy: ``max_abs``, ``clip_q0.999``, or ours.
        threshold: t, the largest magnitude that is not clipped.
        count: values.
        mae, rmse: mean absolute and root mean square error.
        rel_mae: mae / mean of abs(x).
        rel_rmse: rmse / rms of x.
        sqnr_db: 10 log10(sum x^2 / sum e^2); None if there is no error.
        clip_rate: share of values with abs(x) > t.
        body_sqnr_db: SQNR of the values up to the 0.999 quantile; not published.
        zeroed: share of all values that are not 0 and become 0; not published.
    """

    checkpoint: str
    bits: int
    clip_quantile: float
    calibration_samples: int
    eval_samples: int
    site: str
    policy: str
    threshold: float
    count: int
    mae: float
    rmse: float
    rel_mae: float
    rel_rmse: float
    sqnr_db: float | None
    clip_rate: float
    body_sqnr_db: float | None = None
    zeroed: float | None = None


def published_rows() -> list[SiteRow]:
    """All 4,214 sites of the 27 checkpoints."""
    with gzip.open(files("calib.protocols").joinpath("published_activation_stats.csv.gz").open("rb"), "rt") as stream:
        return [_site_row(record) for record in csv.DictReader(stream)]


def published_maxima() -> list[CheckpointMaximum]:
    """M of the 27 checkpoints, largest first."""
    rows: dict[str, list[SiteRow]] = {}
    for row in published_rows():
        rows.setdefault(row.checkpoint, []).append(row)
    return sorted((CheckpointMaximum.of(r) for r in rows.values()), key=lambda m: (-m.magnitude, m.checkpoint))


def published_sanity() -> list[SanityRow]:
    """The 16 rows of the INT8 sanity check: 8 checkpoints, 2 policies."""
    text = files("calib.protocols").joinpath("published_int8_sanity.csv").read_text(encoding="utf-8")
    return [
        SanityRow(
            checkpoint=r["checkpoint"],
            bits=int(r["bits"]),
            clip_quantile=float(r["clip_quantile"]),
            calibration_samples=int(r["calibration_samples"]),
            eval_samples=int(r["eval_samples"]),
            site=r["site"],
            policy=r["policy"],
            threshold=float(r["threshold"]),
            count=int(r["count"]),
            mae=float(r["mae"]),
            rmse=float(r["rmse"]),
            rel_mae=float(r["rel_mae"]),
            rel_rmse=float(r["rel_rmse"]),
            sqnr_db=float(r["sqnr_db"]),
            clip_rate=float(r["clip_rate"]),
        )
        for r in csv.DictReader(io.StringIO(text))
    ]


def _site_row(r: dict[str, str]) -> SiteRow:
    return SiteRow(
        checkpoint=r["checkpoint"],
        family=r["family"],
        model_type=r["model_type"],
        num_hidden_layers=int(r["num_hidden_layers"]),
        hidden_size=int(r["hidden_size"]),
        site=PaperSite(r["site_kind"], int(r["layer"]) if r["layer"] else None),
        min=float(r["min"]),
        max=float(r["max"]),
        mean=float(r["mean"]),
        std=float(r["std"]),
        rms=float(r["rms"]),
        abs_mean=float(r["abs_mean"]),
        abs_median=_optional(r["abs_median"]),
        abs_q99=_optional(r["abs_q99"]),
        abs_q999=_optional(r["abs_q999"]),
        count=float(r["count"]),
        massive_tokens=int(float(r["sun_n_pass"])) if r["sun_n_pass"] else None,
    )


def _optional(text: str) -> float | None:
    return float(text) if text else None
