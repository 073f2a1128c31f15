# SPDX-License-Identifier: Apache-2.0
"""Outputs of models that are no language models: class or token logits, or embeddings, against those in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.errors import GateError, UsageError

__all__ = ["OutputScores", "compare_outputs"]

Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, eq=False)
class OutputScores:
    """Figures of one quantized form, by block.

    Attributes:
        cosine: to the float embedding, float64 ``[blocks]``; None where the model gives logits.
        top1: same class or token on top, float64 ``[blocks]`` or ``[blocks, tokens]``; None where it gives embeddings.
        sqnr_db: over all values; None if nothing differs.
    """

    cosine: NDArray[np.float64] | None
    top1: NDArray[np.float64] | None
    sqnr_db: float | None


def compare_outputs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    variants: Mapping[str, Context],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, OutputScores]:
    """Runs the float model and each quantized one on every batch; an embedding is the mean over a block's tokens.

    Args:
        model: gives ``logits`` or ``last_hidden_state``.
        batches: arguments of a forward pass each, without padding.
        variants: name -> makes a context in which the model is quantized.
        progress: called with the number of blocks done.

    Raises:
        UsageError: no batch, or the model gives neither.
        GateError: an output was NaN or infinite.
    """
    found: dict[str, list[tuple[NDArray[np.float64], float, float]]] = {name: [] for name in variants}
    logits, done = False, 0
    for batch in batches:
        exact, logits = _run(model, batch)
        for name, variant in variants.items():
            with variant():
                other, _ = _run(model, batch)
            same = _same_top(exact, other) if logits else _cosine(exact, other)
            found[name].append((same, float(exact.square().sum()), float((exact - other).square().sum())))
        done += len(exact)
        if progress is not None:
            progress(done)
    if not done:
        raise UsageError("evaluation: no batch; give at least one")
    return {name: _scores(rows, logits=logits) for name, rows in found.items()}


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, bool]:
    """Float64 ``[blocks, (tokens,) size]``, and whether it is logits."""
    with torch.no_grad():
        output = model(**batch)
    logits, hidden = getattr(output, "logits", None), getattr(output, "last_hidden_state", None)
    values = logits if isinstance(logits, torch.Tensor) else hidden.mean(1) if hidden is not None else None
    if values is None:
        raise UsageError(f"{type(model).__name__}: gives neither logits nor hidden states; evaluate it in Python")
    if not bool(values.isfinite().all()):
        raise GateError("evaluation: the model gives NaN or infinite outputs; check scales and dtype")
    return values.double(), values is logits


def _same_top(exact: torch.Tensor, other: torch.Tensor) -> NDArray[np.float64]:
    same: NDArray[np.float64] = (exact.argmax(-1) == other.argmax(-1)).double().cpu().numpy()
    return same


def _cosine(exact: torch.Tensor, other: torch.Tensor) -> NDArray[np.float64]:
    cosine: NDArray[np.float64] = nn.functional.cosine_similarity(exact, other, dim=-1).cpu().numpy()
    return cosine


def _scores(rows: list[tuple[NDArray[np.float64], float, float]], *, logits: bool) -> OutputScores:
    same, energy, noise = np.concatenate([r[0] for r in rows]), sum(r[1] for r in rows), sum(r[2] for r in rows)
    sqnr = 10 * math.log10(energy / noise) if energy > 0 and noise > 0 else None
    return OutputScores(None, same, sqnr) if logits else OutputScores(same, None, sqnr)
