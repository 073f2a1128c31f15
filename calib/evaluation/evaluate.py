# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: a model in float and in its quantized forms on the same blocks, and where the error comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from calib import __version__
from calib.corpus import TokenBlocks
from calib.errors import ArtifactError, UsageError
from calib.evaluation.interval import Interval, mean_interval, perplexity_ratio
from calib.evaluation.language import compare_many, score_tokens
from calib.evaluation.layer_table import layer_table
from calib.evaluation.layers import layer_errors
from calib.evaluation.outputs import compare_outputs
from calib.evaluation.prefix import prefix_of, require_in_vocabulary
from calib.measurement.failure import explained
from calib.models import OpenedModel
from calib.models.takes import text_inputs, writes
from calib.quantized import QuantizationPlan, QuantizedModel, QuantizedWeight, plan_from_scales
from calib.quantized.grid import Convention
from calib.schema.evaluation import EvaluationFile, EvaluationRow, IntervalRecord, LayerTable
from calib.schema.provenance import Producer
from calib.schema.scales import ScaleFile

__all__ = ["INPUTS", "evaluate"]

Mode = Literal["none", "dynamic-per-token", "static"]
INPUTS: tuple[Mode, ...] = ("none", "dynamic-per-token", "static")
_LABELS = {"none": "weights only", "dynamic-per-token": "dynamic per-token", "static": "static"}
_TOKENS_PER_BATCH = 1024


def evaluate(
    opened: OpenedModel,
    blocks: TokenBlocks,
    scales: ScaleFile | None = None,
    *,
    inputs: Sequence[Mode] = (),
    kv_cache: Mode = "none",
    kv_bits: int | None = None,
    convention: Convention = "calib",
    codes: Mapping[str, QuantizedWeight] | None = None,
    online: bool = False,
    ignore: Sequence[str] = (),
    batch_size: int | None = None,
    layer_blocks: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationFile:
    """Evaluates the float model, and one row per way to round its inputs.

    A prefix among the cures of the scale file stands in front of each block, in float; perplexity ratios are then to
    the float model with the same prefix, and the float model without it has a row of its own. The last row is the one
    whose tensors are looked at.

    Args:
        opened: language model, classifier, encoder, or encoder-decoder, both halves of which then read the blocks.
        blocks: of equal length; not the calibration data.
        scales: of this very checkpoint; without it weights take absmax per row, and nothing can be static.
        inputs: rows wanted, of `INPUTS`; those that can be had if empty.
        kv_cache: how keys and values are rounded, in every quantized row.
        kv_bits: see `plan_from_scales`.
        convention: whose formula makes a scale of a range.
        codes: weights that were rounded before, as error compensation does.
        online: the model computes what a cure asks for as it runs, a rotation for instance.
        ignore: modules left in float.
        batch_size: blocks of a forward pass; about 1,024 tokens if absent.
        layer_blocks: blocks of which every tensor is compared; 0 for none.
        progress: called with (tokens done, tokens in all).

    Raises:
        UsageError: rows or options that cannot be had.
        ArtifactError: the scale file is of another model, or its prefix is outside of the vocabulary.
        GateError: NaN.
        ModelError: the model cannot run on such blocks, or memory does not suffice.
    """
    model = opened.model
    prefix: tuple[int, ...] = ()
    notes: list[str] = []
    if scales is not None:
        _require_same_model(opened, scales)
        prefix = prefix_of(scales, online=online)
        notes = _notes(opened, blocks, scales, codes)
    if writes(model):
        notes.append("the decoder reads the same tokens as the encoder, whose output it attends to")
    require_in_vocabulary(model, prefix)
    wanted = [mode for mode in INPUTS if mode in (inputs or INPUTS)]
    if scales is None and not inputs:
        wanted.remove("static")
    rows = []
    for mode in wanted:
        plan = plan_from_scales(
            model,
            scales,
            inputs=mode,
            kv_cache=kv_cache,
            kv_bits=kv_bits,
            convention=convention,
            ignore=ignore,
            skip_positions=len(prefix),
        )
        plan = plan.with_weights({name: weight for name, weight in (codes or {}).items() if name in plan.weights})
        label = _LABELS[mode] + ("" if kv_cache == "none" else f", keys and values {_LABELS[kv_cache]}")
        rows.append(_Form(label, mode, kv_cache, plan))
    size = batch_size or max(1, _TOKENS_PER_BATCH // blocks.input_ids.shape[1])
    language = opened.task == "text-generation"
    if prefix and not language:
        raise UsageError(f"{opened.provenance.name}: is no language model, a prefix does not apply; measure without it")
    run = _Run(model, blocks.input_ids, prefix, size, language, _in_tokens(progress, blocks))
    layers: LayerTable | None = None
    with explained(opened, (size, len(prefix) + blocks.input_ids.shape[1]), measuring=False):
        figures = run.in_words(rows) if language else run.outputs(rows)
        if layer_blocks > 0:
            few = min(layer_blocks, len(blocks))
            found = layer_errors(model, run.batches(1, few), rows[-1].plan, scales=scales)
            layers = layer_table(found, rows[-1].label, few)
    return EvaluationFile(
        producer=Producer(version=__version__),
        model=opened.provenance,
        corpus=blocks.provenance,
        measurement_sha256=None if scales is None else scales.measurement_sha256,
        bits=8 if scales is None else scales.bits,
        rows=figures,
        left_out=dict(rows[-1].plan.left_out),
        layers=layers,
        notes=notes,
    )


@dataclass
class _Form:
    """One quantized form: a row to be."""

    label: str
    inputs: Mode
    kv_cache: Mode
    plan: QuantizationPlan
    last: QuantizedModel | None = field(default=None)

    def context(self, model: nn.Module) -> Callable[[], AbstractContextManager[object]]:
        """Makes contexts, and keeps one: it knows what no pass has reached."""

        def make() -> QuantizedModel:
            self.last = QuantizedModel(model, self.plan)
            return self.last

        return make

    def row(self, **figures: Any) -> EvaluationRow:
        """With what was found."""
        silent = [] if self.last is None else self.last.silent()
        return EvaluationRow(label=self.label, inputs=self.inputs, kv_cache=self.kv_cache, silent=silent, **figures)


@dataclass
class _Run:
    model: nn.Module
    ids: np.ndarray[Any, np.dtype[np.int64]]
    prefix: tuple[int, ...]
    batch_size: int
    language: bool
    progress: Callable[[int, int], None] | None

    def in_words(self, forms: Sequence[_Form]) -> list[EvaluationRow]:
        rows = []
        if self.prefix:
            plain = score_tokens(self.model, self.ids, batch_size=self.batch_size)
            rows.append(EvaluationRow(label="float, no prefix", inputs="float", perplexity=plain.perplexity))
        reference, found = compare_many(
            self.model,
            self.ids,
            {form.label: form.context(self.model) for form in forms},
            prefix=self.prefix,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        label = "float, with the prefix" if self.prefix else "float"
        prefix = list(self.prefix)
        rows.append(EvaluationRow(label=label, inputs="float", prefix=prefix, perplexity=reference.perplexity))
        for form in forms:
            scores = found[form.label]
            assert scores.kl is not None
            assert scores.top1 is not None
            rows.append(
                form.row(
                    prefix=prefix,
                    perplexity=scores.perplexity,
                    ratio=_record(perplexity_ratio(scores.nll, reference.nll)),
                    kl=_record(mean_interval(scores.kl)),
                    top1=_record(mean_interval(scores.top1.astype(np.float64))),
                )
            )
        return rows

    def outputs(self, forms: Sequence[_Form]) -> list[EvaluationRow]:
        total = len(self.ids)
        report = None if self.progress is None else (lambda done, to=self.progress: to(done, total))
        contexts = {form.label: form.context(self.model) for form in forms}
        found = compare_outputs(self.model, self.batches(self.batch_size), contexts, progress=report)
        rows = [EvaluationRow(label="float", inputs="float")]
        for form in forms:
            scores = found[form.label]
            cosine = None if scores.cosine is None else _record(mean_interval(scores.cosine))
            top1 = None if scores.top1 is None else _record(mean_interval(scores.top1))
            rows.append(form.row(cosine=cosine, top1=top1, sqnr_db=scores.sqnr_db))
        return rows

    def batches(self, size: int, blocks: int | None = None) -> Iterator[dict[str, Any]]:
        """Arguments of forward passes, the prefix in front."""
        ids = self.ids[:blocks]
        front = np.broadcast_to(np.asarray(self.prefix, np.int64), (len(ids), len(self.prefix)))
        rows = torch.from_numpy(np.concatenate([front, ids], 1))
        for start in range(0, len(rows), size):
            yield text_inputs(self.model, rows[start : start + size]) | ({"use_cache": False} if self.language else {})


def _record(found: Interval) -> IntervalRecord:
    return IntervalRecord(value=found.value, low=found.low, high=found.high)


def _in_tokens(progress: Callable[[int, int], None] | None, blocks: TokenBlocks) -> Callable[[int, int], None] | None:
    width = blocks.input_ids.shape[1]
    return None if progress is None else (lambda done, total: progress(done * width, total * width))


def _require_same_model(opened: OpenedModel, scales: ScaleFile) -> None:
    if scales.model.fingerprint != opened.provenance.fingerprint:
        raise ArtifactError(
            f"{opened.provenance.name}: the scales are of another model, {scales.model.name}; "
            "pass the checkpoint that was measured, or restore its cures"
        )


def _notes(
    opened: OpenedModel, blocks: TokenBlocks, scales: ScaleFile, codes: Mapping[str, QuantizedWeight] | None
) -> list[str]:
    notes = []
    if scales.corpus.content_sha256 == blocks.provenance.content_sha256:
        notes.append("these blocks are the calibration data; pass others with -d or --seed")
    elif {s.sha256 for s in scales.corpus.sources} & {s.sha256 for s in blocks.provenance.sources}:
        notes.append(
            "these blocks come from the texts of the calibration data, some may be the same; pass others with -d"
        )
    if codes is None and any(cure.kind == "compensate" for cure in scales.cures):
        notes.append("weights are rounded to the nearest here, those of the cured checkpoint with error compensation")
    if scales.model.dtype != opened.provenance.dtype:
        notes.append(f"the scales were measured in {scales.model.dtype}, the model runs in {opened.provenance.dtype}")
    return notes
