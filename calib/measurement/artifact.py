# SPDX-License-Identifier: Apache-2.0
"""`Measurement`: all statistics of one model on one corpus, with where they came from; saved, loaded, merged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from calib import __version__
from calib.errors import ArtifactError
from calib.measurement.arrays import pack, unpack
from calib.measurement.merging import merged_gates, merged_sites, plan_gate
from calib.measurement.site import Gate, Site, WeightSite
from calib.output import output_folder
from calib.schema.measurement import (
    VERSION,
    GateRecord,
    MeasurementFile,
    ModalityRecord,
    PeakRecord,
    SiteRecord,
    WeightRecord,
)
from calib.schema.provenance import CorpusProvenance, ModelProvenance, Producer, RunProvenance
from calib.statistics import SINK, SiteStatistics, WeightStatistics

__all__ = ["ARRAYS", "RECORD", "Measurement", "plan_gate"]

RECORD, ARRAYS = "measurement.json", "measurement.safetensors"
_QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)
_PEAKS_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Measurement:
    """One model on one corpus.

    Attributes:
        sites: by canonical name, in module order.
        weights: by ``fqn:weight``, in module order.
        model, corpus, run: provenance.
        gates: conditions that must hold before scales are written.
    """

    sites: dict[str, Site]
    weights: dict[str, WeightSite]
    model: ModelProvenance
    corpus: CorpusProvenance
    run: RunProvenance
    gates: list[Gate]

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return all(gate.passed for gate in self.gates)

    @property
    def full(self) -> bool:
        """Whether histograms are there, or ranges only."""
        return all(site.statistics.histogram is not None for site in self.sites.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of what was measured: arrays, model and corpus. Equal runs have equal hashes."""
        digest = hashlib.sha256(self.model.fingerprint.encode() + self.corpus.content_sha256.encode())
        for name, array in sorted(self._tensors().items()):
            digest.update(name.encode() + str(array.dtype).encode() + array.tobytes())
        return digest.hexdigest()

    def merge(self, other: Measurement) -> Measurement:
        """Of the batches of both, which must be different ones of the same plan.

        Raises:
            ArtifactError: they differ in model, corpus, sites or settings, or share a batch.
        """
        for what, mine, theirs in (
            ("model", self.model.fingerprint, other.model.fingerprint),
            ("corpus", self.corpus.content_sha256, other.corpus.content_sha256),
            ("weights", list(self.weights), list(other.weights)),
            ("dtype", self.run.dtype, other.run.dtype),
            ("batch size", self.run.batch_size, other.run.batch_size),
            ("sink positions", self.run.sink_positions, other.run.sink_positions),
            ("statistics", self.full, other.full),
            ("protocol", self.run.protocol, other.run.protocol),
            ("generated tokens", self.run.generate, other.run.generate),
            ("selection", self._selection, other._selection),
        ):
            if mine != theirs:
                raise ArtifactError(f"merge: the measurements differ in {what}; merge shards of one plan only")
        shared = set(self.run.batches) & set(other.run.batches)
        if shared:
            raise ArtifactError(f"merge: batch {min(shared)} is in both measurements; each batch may count once")
        sites = merged_sites(self.sites, other.sites)
        batches = sorted([*self.run.batches, *other.run.batches])
        seconds = [s for s in (self.run.seconds, other.run.seconds) if s is not None]
        run = self.run.model_copy(update={"batches": batches, "seconds": sum(seconds) if seconds else None})
        return replace(self, sites=sites, run=run, gates=merged_gates(self.gates, other.gates, sites, run))

    @property
    def _selection(self) -> tuple[list[str], list[str]]:
        return self.run.sites_pattern, self.run.ignore_pattern

    def require_same_plan(self, model: ModelProvenance, corpus: CorpusProvenance) -> None:
        """Checks, before any work, that a model and a corpus are those measured here.

        Raises:
            ArtifactError: one of them is another.
        """
        if self.model.fingerprint != model.fingerprint:
            raise ArtifactError(f"{model.name}: the measurement is of another model, {self.model.name}; measure anew")
        if self.corpus.content_sha256 != corpus.content_sha256:
            raise ArtifactError(
                "corpus: the measurement is of other token blocks; pass the same --data, --samples, --max-length, "
                "--seed and layout as before"
            )

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Writes `measurement.json` and `measurement.safetensors`, both or neither.

        Raises:
            UsageError: the folder exists and is not to be overwritten.
            ArtifactError: the disk is full or fails.
        """
        with output_folder(folder, overwrite=overwrite) as work:
            try:
                save_file(self._tensors(), work / ARRAYS, metadata={"format": f"calib.measurement/{VERSION}"})
            except SafetensorError as error:  # how safetensors reports a full disk
                raise ArtifactError(
                    f"{folder}: cannot be written ({error}); free some space or choose another folder"
                ) from error
            (work / ARRAYS).chmod(0o644)
            with (work / ARRAYS).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            record = self._record(digest)
            text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
            (work / RECORD).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Measurement:
        """Reads a measurement and checks that it is whole.

        Raises:
            ArtifactError: a file is missing, damaged, does not fit the other, or of a newer major version.
        """
        record = _read_record(folder / RECORD)
        arrays = folder / ARRAYS
        if not arrays.is_file():
            raise ArtifactError(f"{arrays}: missing beside {RECORD}; copy the whole folder, or measure again")
        with arrays.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != record.arrays_sha256:
                raise ArtifactError(f"{arrays}: differs from what {RECORD} describes; copy it again, or measure again")
        try:
            tensors = load_file(arrays)
            statistics = [SiteStatistics.from_tensors(t) for t in unpack("sites", tensors, len(record.sites))]
            held = [(name, part) for name, r in record.sites.items() for part in r.modalities]
            parts = [SiteStatistics.from_tensors(t) for t in unpack("parts", tensors, len(held))]
            of_weights = [WeightStatistics.from_tensors(t) for t in unpack("weights", tensors, len(record.weights))]
        except (KeyError, IndexError, TypeError, ValueError, SafetensorError) as error:
            raise ArtifactError(
                f"{arrays}: does not hold what this version needs ({type(error).__name__}: {error}); measure again"
            ) from error
        _check_fit(record, statistics, folder / RECORD)
        apart: dict[str, dict[str, SiteStatistics]] = {}
        for (name, part), one in zip(held, parts, strict=True):
            apart.setdefault(name, {})[part] = one
        sites = {
            name: Site(name, r.kind, r.module, r.port, r.layer, r.dtype, r.channels, r.aliases, s,
                       tuple(r.order), r.heads, r.expert, r.forced, apart.get(name, {}))
            for (name, r), s in zip(record.sites.items(), statistics, strict=True)
        }  # fmt: skip
        weights = {
            name: WeightSite(name, w.module, w.layer, w.dtype, tuple(w.tied), s)
            for (name, w), s in zip(record.weights.items(), of_weights, strict=True)
        }
        gates = [Gate(g.name, g.passed, g.detail, tuple(g.names)) for g in record.gates]
        return cls(sites, weights, record.model, record.corpus, record.run, gates)

    def _tensors(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
        parts = [part.to_tensors() for site in self.sites.values() for part in site.parts.values()]
        return {
            **(pack("parts", parts) if parts else {}),
            **pack("sites", [site.statistics.to_tensors() for site in self.sites.values()]),
            **pack("weights", [weight.statistics.to_tensors() for weight in self.weights.values()]),
        }

    def _record(self, arrays_sha256: str) -> MeasurementFile:
        coverage = Counter(kind for s in self.sites.values() for kind in {s.name: s.kind, **s.aliases}.values())
        return MeasurementFile(
            producer=Producer(version=__version__),
            model=self.model,
            corpus=self.corpus,
            run=self.run,
            gates=[GateRecord(name=g.name, passed=g.passed, detail=g.detail, names=list(g.names)) for g in self.gates],
            coverage=dict(sorted(coverage.items())),
            statistics="full" if self.full else "ranges",
            arrays_sha256=arrays_sha256,
            sites={name: _site_record(site) for name, site in self.sites.items()},
            weights={name: _weight_record(weight) for name, weight in self.weights.items()},
        )


def _read_record(path: Path) -> MeasurementFile:
    if not path.is_file():
        raise ArtifactError(f"{path.parent}: holds no {RECORD}; pass a folder that `calib measure` wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: is no JSON ({error}); copy it again, or measure again") from error
    if not isinstance(raw, dict) or raw.get("format") != "calib.measurement":
        raise ArtifactError(f"{path}: is no measurement of calib; pass a folder that `calib measure` wrote")
    version = str(raw.get("version", ""))
    if version.partition(".")[0] != VERSION.partition(".")[0]:
        raise ArtifactError(
            f"{path}: has version {version}, this calib reads {VERSION}; update calib, or measure again"
        )
    try:
        return MeasurementFile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}; copy it again, or measure again") from error


def _check_fit(record: MeasurementFile, statistics: Sequence[SiteStatistics], path: Path) -> None:
    """The record repeats what the arrays say: a site that was edited, moved or renamed in it stands out."""
    for (name, site), held in zip(record.sites.items(), statistics, strict=True):
        values, channels = held.range, held.channels
        seen = values.count_all > 0
        for what, told, found in (
            ("count", site.count, values.count_all),
            ("nonfinite", site.nonfinite, values.nonfinite_all),
            ("min", site.min, values.min if seen else None),
            ("max", site.max, values.max if seen else None),
            ("amax", site.amax, values.amax),
            ("channels", site.channels, site.channels if channels is None else channels.minimum.shape[1]),
        ):
            if told != found:
                raise ArtifactError(
                    f"{path}: {name}: {what} is {told}, the arrays say {found}; copy both files again, or measure again"
                )


def _site_record(site: Site) -> SiteRecord:
    statistics = site.statistics
    values = statistics.range
    seen = values.count_all > 0
    peaks = statistics.peaks
    quantiles: dict[str, float] = {}
    if statistics.histogram is not None and seen:
        found = statistics.histogram.quantiles_abs(_QUANTILES)
        quantiles = {str(q): value for q, value in zip(_QUANTILES, found, strict=True)}
    return SiteRecord(
        kind=site.kind,
        module=site.module,
        port=site.port,
        layer=site.layer,
        dtype=site.dtype,
        channels=site.channels,
        count=values.count_all,
        nonfinite=values.nonfinite_all,
        first_nonfinite=statistics.fault.place,
        min=values.min if seen else None,
        max=values.max if seen else None,
        amax=values.amax,
        rms=values.rms if seen else None,
        sink_amax=values.of(SINK).amax,
        body_amax=values.of(1 - SINK).amax,
        quantiles_abs=quantiles,
        aliases=site.aliases,
        order=list(site.order),
        heads=site.heads,
        expert=site.expert,
        forced=site.forced,
        modalities={name: _modality_record(part) for name, part in site.parts.items()},
        peaks=[
            PeakRecord(
                value=float(peaks.value[i]),
                document=int(peaks.document[i]),
                position=int(peaks.position[i]),
                channel=int(peaks.channel[i]),
                token_id=int(peaks.token_id[i]),
            )
            for i in range(min(_PEAKS_SHOWN, len(peaks)))
        ]
        if peaks is not None
        else [],
    )


def _modality_record(part: SiteStatistics) -> ModalityRecord:
    span = part.range
    return ModalityRecord(
        count=span.count_all, amax=span.amax, sink_amax=span.of(SINK).amax, body_amax=span.of(1 - SINK).amax
    )


def _weight_record(weight: WeightSite) -> WeightRecord:
    return WeightRecord(
        module=weight.module,
        layer=weight.layer,
        dtype=weight.dtype,
        shape=list(weight.statistics.shape),
        amax=weight.statistics.range.amax,
        rms=weight.statistics.range.rms,
        tied=list(weight.tied),
    )
