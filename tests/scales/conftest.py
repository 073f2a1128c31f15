# SPDX-License-Identifier: Apache-2.0
"""Tensors of known kinds, and the statistics and measurements that calib would have taken of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib.measurement.artifact import Measurement
from calib.measurement.site import Gate, Site, WeightSite
from calib.scales import Distribution
from calib.schema.provenance import CorpusProvenance, ModelProvenance, RunProvenance
from calib.statistics import FloatHistogram, Observation, Range, SiteStatistics, WeightStatistics
from calib.statistics.histogram import bfloat16_bins, bin_values

MODEL = ModelProvenance(
    name="tiny",
    architecture="Tiny",
    model_type="module",
    task="text-generation",
    dtype="float32",
    parameters=1,
    source_format="memory",
    config_sha256="0" * 64,
    weights_sha256={},
)
CORPUS = CorpusProvenance(
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
    content_sha256="0" * 64,
)
RUN = RunProvenance(
    command="test",
    device="cpu",
    dtype="float32",
    batch_size=1,
    batches=[0],
    planned_batches=1,
    sink_positions=4,
    kernel="reference",
    threads=1,
    sites_pattern=[],
    ignore_pattern=[],
    versions={},
)


class Lab:
    """Makes tensors and their statistics."""

    kinds = ("normal", "heavy-tailed", "spiked", "half-normal", "uniform", "relu")

    @staticmethod
    def bfloat16(x: Any) -> np.ndarray:
        return bin_values(bfloat16_bins(np.asarray(x, np.float32))).astype(np.float32)

    @staticmethod
    def values(kind: str, size: int = 200_000, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        x = {
            "normal": rng.standard_normal,
            "heavy-tailed": lambda n: rng.standard_t(3, n),
            "spiked": rng.standard_normal,
            "half-normal": lambda n: np.abs(rng.standard_normal(n)),
            "uniform": lambda n: rng.uniform(-1, 3, n),
            "relu": lambda n: np.maximum(rng.standard_normal(n), 0),
        }[kind](size)
        if kind == "spiked":
            # as massive activations are: a few hundred values, all near one magnitude
            x[: size // 1000] = 3000 + 100 * rng.standard_normal(size // 1000)
        return x.astype(np.float32)

    @staticmethod
    def statistics(x: np.ndarray, *, sinks: int = 0) -> SiteStatistics:
        """Of ``[blocks, tokens, channels]``; the first `sinks` tokens of a block are sink positions."""
        context = Observation.of_tokens(np.zeros(x.shape[:2], np.int64), sink_positions=sinks)
        return SiteStatistics.observe(np.asarray(x, np.float32), context)

    @staticmethod
    def flat(x: np.ndarray) -> tuple[FloatHistogram, Range]:
        values = np.asarray(x, np.float32).reshape(1, 1, -1)
        context = Observation.of_shape(1, 1)
        return FloatHistogram.observe(values, context), Range.observe(values, context)

    @classmethod
    def distribution(cls, x: np.ndarray, dtype: str = "float32") -> Distribution:
        return Distribution.of(*cls.flat(x), dtype)

    @classmethod
    def site(cls, name: str, x: np.ndarray, *, sinks: int = 0, **more: Any) -> Site:
        module, _, port = name.partition(":")
        fields = {"kind": "linear_input", "layer": 0, "dtype": "float32", "aliases": {}, **more}
        return Site(
            name=name,
            module=module,
            port=port,
            channels=x.shape[2],
            statistics=cls.statistics(x, sinks=sinks),
            **fields,
        )

    @classmethod
    def weight(cls, module: str, w: np.ndarray, dtype: str = "float32", tied: tuple[str, ...] = ()) -> WeightSite:
        histogram, extent = cls.flat(w)
        statistics = WeightStatistics(w.min(1), w.max(1), np.abs(w).max(0), extent, histogram, w.shape)
        return WeightSite(f"{module}:weight", module, 0, dtype, tied, statistics)

    @staticmethod
    def measurement(*parts: Site | WeightSite) -> Measurement:
        sites = {part.name: part for part in parts if isinstance(part, Site)}
        weights = {part.name: part for part in parts if isinstance(part, WeightSite)}
        return Measurement(sites, weights, MODEL, CORPUS, RUN, [Gate("fired", True, "")])


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
