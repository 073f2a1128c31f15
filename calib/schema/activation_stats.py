# SPDX-License-Identifier: Apache-2.0
"""Files in the fields of arXiv 2605.15572's own code: `NAME_activation_stats.json` and two companions.

Written by calib with one more field, `calib`, that says where they come from; read from anybody, so unknown fields
are kept and those that calib does not need may be absent. All numbers per site are floats, counts too, as published.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from calib.schema.provenance import Producer, Strict

__all__ = [
    "ActivationStatsFile",
    "ProtocolProvenance",
    "QuantSanityFile",
    "QuantSanityMetrics",
    "SiteStats",
    "TopValues",
    "TopValuesFile",
]


class Foreign(BaseModel):
    """A record that others write, too."""

    model_config = ConfigDict(extra="allow", frozen=True)


class ProtocolProvenance(Strict):
    """What the published fields do not say."""

    producer: Producer
    measurement_sha256: str
    model_fingerprint: str
    dtype: str
    attention: str | None
    sites: dict[str, list[str]] = Field(description="Published name -> names of the same tensor in the measurement")


class SiteStats(Foreign):
    """One site. The fields after `count` exist for the five kinds that count for M only."""

    mean: float
    std: float
    abs_mean: float
    rms: float
    max: float
    min: float
    count: float
    sun_peak_abs: float | None = Field(default=None, description="Largest magnitude of any tested token")
    sun_peak_token_median: float | None = Field(default=None, description="Median magnitude of that token")
    sun_peak_token_ratio: float | None = None
    sun_max_ratio: float | None = Field(default=None, description="Largest max / median of any token")
    sun_max_ratio_abs: float | None = None
    sun_max_ratio_median: float | None = None
    sun_mean_ratio: float | None = None
    sun_std_ratio: float | None = None
    sun_n_tokens: float | None = None
    sun_n_pass: float | None = Field(default=None, description="Tokens with max > sun_t_val and ratio > sun_t_ratio")
    sun_t_val: float | None = None
    sun_t_ratio: float | None = None
    abs_median: float | None = None
    abs_q25: float | None = None
    abs_q75: float | None = None
    abs_q90: float | None = None
    abs_q99: float | None = None
    abs_q999: float | None = None
    abs_hist_count: float | None = None
    abs_hist_zero_frac: float | None = None


class Header(Foreign):
    """What every file begins with."""

    model_name: str
    model_path: str = ""
    model_type: str = ""
    num_hidden_layers: int
    hidden_size: int
    data_path: str = ""
    num_samples: int = 0
    max_seq_len: int = 0


class ActivationStatsFile(Header):
    """The whole of `NAME_activation_stats.json`."""

    global_max_activation: float = Field(description="M, signed")
    global_max_location: str = Field(description="e.g. 'layer_16_hidden (max)'")
    per_layer_stats: dict[str, SiteStats]
    calib: ProtocolProvenance | None = None


class TopValues(Foreign):
    """The largest magnitudes of one site, descending."""

    topk_abs: list[float]
    topk_signed: list[float]
    top_k: int
    topk_abs_mean: float
    topk_signed_mean: float


class TopValuesFile(Header):
    """The whole of `NAME_top5_stats.json`. The name is the authors': it holds up to 100 values per site."""

    global_top5_abs: list[float]
    global_top5_signed: list[float]
    global_top5_abs_mean: float
    per_layer_stats: dict[str, TopValues]
    calib: ProtocolProvenance | None = None


class QuantSanityMetrics(Foreign):
    """One policy on one site."""

    layer: str
    policy: str
    count: int
    mae: float
    rmse: float
    rel_mae: float
    rel_rmse: float
    sqnr_db: float | None
    clip_rate: float
    body_sqnr_db: float | None = None
    zeroed: float | None = None


class QuantSanityFile(Foreign):
    """The whole of `NAME_quant_sanity.json`."""

    model_name: str
    family: str = ""
    role: str = ""
    model_path: str = ""
    data_path: str = ""
    bits: int
    clip_quantile: float
    calibration_samples: int
    eval_samples: int
    max_seq_len: int = 0
    layer_policy: str
    selected_layers: list[str]
    reference_global_max_abs: float
    reference_global_max_location: str
    thresholds: dict[str, dict[str, float]]
    metrics: list[QuantSanityMetrics]
    calib: ProtocolProvenance | None = None
