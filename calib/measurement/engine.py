# SPDX-License-Identifier: Apache-2.0
"""`measure`: one pass of a model over a corpus."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import nn

from calib import __version__
from calib.corpus import Rows, TokenBlocks
from calib.errors import ArtifactError, GateError, UsageError
from calib.measurement.artifact import Measurement, plan_gate
from calib.measurement.calibration import Calibration
from calib.measurement.decoder import Decoder
from calib.measurement.failure import explained
from calib.measurement.head import can_skip_head, takes_cache, without_head
from calib.measurement.weights import measure_weights
from calib.models import OpenedModel, check_token_ids
from calib.models.device import input_device
from calib.models.evaluating import evaluating
from calib.models.takes import generates, parameters_of, writes
from calib.schema.provenance import RunProvenance

__all__ = ["MeasureOptions", "measure", "resume"]

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
"""Enough for matrix multiplication to be efficient; activations of a batch stay small beside the model."""
_PROBE_TOKENS = 16
_PACKAGES = ("torch", "transformers", "numpy", "numba", "tokenizers", "safetensors")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure.

    Attributes:
        batch_size: rows per forward pass; None chooses about 2,048 tokens on a CPU and 16,384 on a GPU. Part of the
            plan: another batch size may change a model's own arithmetic in the last bits.
        sites, ignore: patterns, see `sites.Selection`.
        statistics: ``full`` or ``ranges``.
        kernel: see `kernels.make_kernel`.
        threads: of the CPU kernel; torch's number by default.
        sink_positions: first tokens of a row that are kept apart.
        shard: (i, n): only every n-th batch of the plan, from the i-th on; merging all shards gives the whole.
        weights: measure the weights too.
        min_expert_tokens: fewest tokens that each expert must get for its gate to hold.
        force_experts: experts without tokens are measured on some that are sent to them, and marked.
        generate: tokens that the model continues each block by, greedily; they are measured as they are computed, one
            by one, beside the block itself.
        protocol: recorded.
        command: recorded.
    """

    batch_size: int | None = None
    sites: Sequence[str] = ()
    ignore: Sequence[str] = ()
    statistics: str = "full"
    kernel: str = "auto"
    threads: int | None = None
    sink_positions: int = 4
    shard: tuple[int, int] = (0, 1)
    weights: bool = True
    min_expert_tokens: int = 1
    force_experts: bool = False
    generate: int = 0
    protocol: str | None = None
    command: str = "calib.measure"


def measure(
    opened: OpenedModel,
    blocks: Rows,
    options: MeasureOptions | None = None,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    around: Callable[[Calibration], Any] | None = None,
    skip: Sequence[int] = (),
) -> Measurement:
    """Runs a model over a corpus once and returns everything that was seen.

    Args:
        opened: the model; used in evaluation mode, without gradients, stored cache or language-model head.
        blocks: the corpus.
        options: how to measure.
        progress: called with (tokens done, tokens in all) after each batch.
        should_stop: asked after each batch; a yes ends the measurement there, with the gate `plan_complete` open.
        around: makes a context manager to run inside, given the calibration; how protocols watch more.
        skip: batches of the plan that another measurement already holds.

    Raises:
        UsageError: options do not fit each other or the model.
        ModelError: the model cannot run these blocks, or memory does not suffice.
        GateError: nothing was measured.
    """
    options = options or MeasureOptions()
    model, device = opened.model, input_device(opened.model)
    if isinstance(blocks, TokenBlocks):  # examples are checked as they run
        check_token_ids(torch.from_numpy(blocks.input_ids), model)
    batch_size = options.batch_size or _auto_batch_size(blocks, device)
    plan = blocks.batches(batch_size)
    mine = [i for i in _shard(len(plan), options.shard) if i not in set(skip)]
    if not mine:
        raise GateError("measure: all batches of this plan were measured before; nothing is left to do")
    _settle(opened, blocks, plan[0][:1], device)
    _check_generation(opened, blocks, options.generate)
    decoder = Decoder(opened, options.generate, device) if writes(model) else None
    if decoder is not None:  # what it writes is found out before anything is measured
        decoder.prepare(blocks, [plan[0][:1], *(plan[i] for i in mine)])
    calibration = Calibration(
        model,
        sites=options.sites,
        ignore=options.ignore,
        statistics=options.statistics,
        kernel=options.kernel,
        threads=options.threads,
        sink_positions=options.sink_positions,
        min_expert_tokens=options.min_expert_tokens,
        force_experts=options.force_experts,
        keep_cache=options.generate > 0 and decoder is None,
    )
    started, begin = datetime.now(UTC), time.perf_counter()
    total = int(sum(blocks.lengths[plan[i]].sum() for i in mine))
    done, run = 0, []
    head = without_head(model) if not options.generate and can_skip_head(model, device) else nullcontext()
    with torch.no_grad(), evaluating(model), head, calibration, around(calibration) if around else nullcontext():
        with calibration.probe():  # of the whole plan's first row, so that all shards find the same aliases
            _forward(opened, calibration, blocks, plan[0][:1], decoder, width=_PROBE_TOKENS)
        for index in mine:
            rows = plan[index]
            _forward(opened, calibration, blocks, rows, decoder, generate=options.generate)
            run.append(index)
            done += int(blocks.lengths[rows].sum())
            if progress is not None:
                progress(done, total)
            if should_stop is not None and should_stop():
                break
    threads = options.threads or torch.get_num_threads()
    with explained(opened):
        weights = measure_weights(model, kernel=options.kernel, threads=threads) if options.weights else {}
    provenance = RunProvenance(
        command=options.command,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - begin, 3),
        device=_device_name(device),
        dtype=opened.provenance.dtype,
        batch_size=batch_size,
        batches=run,
        planned_batches=len(plan),
        sink_positions=options.sink_positions,
        attention=getattr(getattr(model, "config", None), "_attn_implementation", None),
        kernel=calibration.kernel_name,
        threads=threads,
        sites_pattern=list(options.sites),
        ignore_pattern=list(options.ignore),
        versions=_versions(),
        protocol=options.protocol,
        min_expert_tokens=options.min_expert_tokens,
        force_experts=options.force_experts,
        generate=options.generate,
        decoder=decoder.counts(plan[i] for i in run) if decoder is not None else {},
    )
    sites = calibration.sites()
    gates = [*calibration.gates(), plan_gate(provenance)]
    return Measurement(sites, weights, opened.provenance, blocks.provenance, provenance, gates)


def resume(opened: OpenedModel, blocks: Rows, held: Measurement, options: MeasureOptions, **more: Any) -> Measurement:
    """Measures the batches of the plan that `held` lacks and merges both: equal to one run without a break.

    Args:
        opened: the model of the first part.
        blocks: its corpus.
        held: the first part.
        options: its options; its batch size is kept, whatever they say.
        more: as for `measure`.

    Raises:
        ArtifactError: `held` is of another model, corpus or setting.
        UsageError, ModelError, GateError: as of `measure`.
    """
    held.require_same_plan(opened.provenance, blocks.provenance)
    for what, before, now in (
        ("--dtype", held.run.dtype, opened.provenance.dtype),
        ("--sink-positions", held.run.sink_positions, options.sink_positions),
        ("--sites", held.run.sites_pattern, list(options.sites)),
        ("--ignore", held.run.ignore_pattern, list(options.ignore)),
        ("--statistics", "full" if held.full else "ranges", options.statistics),
        ("--protocol", held.run.protocol, options.protocol),
        ("--generate", held.run.generate, options.generate),
    ):
        if before != now:
            raise ArtifactError(
                f"{what} {now}: the measurement to resume has {before}; pass what it has, or measure anew"
            )
    options = replace(options, batch_size=held.run.batch_size, weights=False)
    rest = measure(opened, blocks, options, skip=held.run.batches, **more)
    return held.merge(replace(rest, weights=held.weights))


def _forward(
    opened: OpenedModel,
    calibration: Calibration,
    blocks: Rows,
    rows: np.ndarray[Any, Any],
    decoder: Decoder | None,
    *,
    width: int | None = None,
    generate: int = 0,
) -> None:
    """One batch, or the first `width` tokens of it. Padding is cut to the longest row and masked.

    With `generate` the model goes on greedily for that many tokens; a decoder with tokens of its own reads them all
    in one pass.
    """
    model: Any = opened.model
    device = input_device(model)
    inputs: dict[str, Any] = {name: t.to(device) for name, t in blocks.inputs(rows, width).tensors.items()}
    ids, valid = inputs.get("input_ids"), None
    if ids is not None and not isinstance(blocks, TokenBlocks):
        check_token_ids(ids.cpu(), model)
    if ids is not None and decoder is None:
        valid = _valid(ids, inputs.get("attention_mask"))
    domain = blocks.domain[rows].astype(np.int16)
    steps = generate if decoder is None else 0
    calibration.annotate(document=blocks.document[rows], domain=domain, valid=valid, passes=max(1, steps))
    if decoder is not None:
        inputs |= decoder.inputs(rows)
    with explained(opened, _shape(inputs)):
        if steps:
            exactly = {"max_new_tokens": steps, "min_new_tokens": steps}
            model.generate(**inputs, do_sample=False, num_beams=1, pad_token_id=0, **exactly)
        else:
            model(**inputs, **_cache_option(model, calibration))


def _valid(ids: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray[Any, Any]:
    """Which tokens count, bool ``[rows, tokens]``."""
    if mask is None or mask.shape != ids.shape:
        return np.ones(tuple(ids.shape), np.bool_)
    valid: np.ndarray[Any, Any] = mask.bool().cpu().numpy()
    return valid


def _shape(inputs: dict[str, Any]) -> tuple[int, ...]:
    first = inputs.get("input_ids")
    return tuple((next(iter(inputs.values())) if first is None else first).shape)


def _cache_option(model: nn.Module, calibration: Calibration) -> dict[str, bool]:
    names = parameters_of(model)
    if not takes_cache(model) or (names is not None and "use_cache" not in names):
        return {}
    return {"use_cache": calibration.watches_cache}


def _settle(opened: OpenedModel, blocks: Rows, rows: np.ndarray[Any, Any], device: torch.device) -> None:
    """Runs a quantized checkpoint on a few tokens: some unpack their weights, and change modules, on the first call."""
    if getattr(getattr(opened.model, "config", None), "quantization_config", None) is None:
        return
    inputs = {name: tensor.to(device) for name, tensor in blocks.inputs(rows, 2).tensors.items()}
    if writes(opened.model):
        inputs["decoder_input_ids"] = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
    with torch.no_grad(), evaluating(opened.model), explained(opened, _shape(inputs)):
        opened.model(**inputs)


def _check_generation(opened: OpenedModel, blocks: Rows, generate: int) -> None:
    if generate < 0:
        raise UsageError(f"--generate {generate}: negative; pass a number of tokens")
    if generate and not generates(opened.model):
        raise UsageError(f"--generate: {type(opened.model).__name__} does not generate; leave the option out")
    if generate and blocks.provenance.layout == "documents":
        raise UsageError("--generate: needs blocks of equal length; pass --layout blocks")


def _auto_batch_size(blocks: Rows, device: torch.device) -> int:
    tokens = _TOKENS_PER_BATCH.get(device.type, _TOKENS_PER_BATCH["cuda"])
    return blocks.rows_per_batch(tokens)


def _shard(batches: int, shard: tuple[int, int]) -> list[int]:
    index, count = shard
    if count < 1 or not 0 <= index < count:
        raise UsageError(f"--shard {index}/{count}: there is no such shard; pass i/n with 0 <= i < n")
    mine = list(range(index, batches, count))
    if not mine:
        raise GateError(f"--shard {index}/{count}: the plan has only {batches} batches; use fewer shards")
    return mine


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device.type}: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


def _versions() -> dict[str, str]:
    found = {"calib": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
