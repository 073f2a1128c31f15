# SPDX-License-Identifier: Apache-2.0
"""What a classifier or an encoder loses: accuracy, agreement, SQNR of logits, cosine of embeddings, item by item."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.errors import GateError, UsageError
from calib.evaluation.interval import Interval, mean_interval

__all__ = ["ClassComparison", "EmbeddingComparison", "collect", "compare_classes", "compare_embeddings"]

Array = NDArray[np.floating[Any]]
Batch = Mapping[str, Any] | torch.Tensor


@dataclass(frozen=True)
class ClassComparison:
    """Logits of a quantized classifier beside those of the float one, for the same items.

    Attributes:
        items: how many were compared.
        agreement: share of items with the same class on top, with its interval.
        sqnr_db: 10 log10(sum of squared float logits / sum of squared differences); None if nothing differs.
        accuracy: share of right answers; None without labels, likewise below.
        float_accuracy: of the float model.
        difference: accuracy minus float accuracy, paired, with its interval.
    """

    items: int
    agreement: Interval
    sqnr_db: float | None
    accuracy: float | None = None
    float_accuracy: float | None = None
    difference: Interval | None = None


@dataclass(frozen=True)
class EmbeddingComparison:
    """Embeddings of a quantized encoder beside those of the float one, for the same items.

    Attributes:
        items: how many were compared.
        cosine: mean over items, with its interval.
        smallest_cosine: of any item.
        sqnr_db: as in `ClassComparison`.
    """

    items: int
    cosine: Interval
    smallest_cosine: float
    sqnr_db: float | None


def collect(
    model: nn.Module, batches: Iterable[Batch], pick: Callable[[Any, Batch], torch.Tensor]
) -> NDArray[np.float32]:
    """Runs a model, float or inside of a `QuantizedModel`, and keeps one vector per item.

    Args:
        model: any module.
        batches: arguments of a forward pass each: by name, or one tensor.
        pick: makes vectors ``[items, size]`` of what the model returned and of the batch.

    Raises:
        UsageError: no batch.
        GateError: a vector was NaN or infinite.
    """
    found = []
    for batch in batches:
        with torch.no_grad():
            output = model(batch) if isinstance(batch, torch.Tensor) else model(**batch)
            found.append(pick(output, batch).float().cpu().numpy())
    if not found:
        raise UsageError("evaluation: no batch; give at least one")
    values: NDArray[np.float32] = np.concatenate(found)
    if not np.isfinite(values).all():
        raise GateError("evaluation: the model gives NaN or infinite outputs; check scales and dtype")
    return values


def compare_classes(
    quantized: Array, reference: Array, labels: NDArray[np.integer[Any]] | None = None
) -> ClassComparison:
    """Compares logits.

    Args:
        quantized: ``[items, classes]``.
        reference: those of the float model.
        labels: right class of each item, ``[items]``.

    Raises:
        UsageError: no item, or shapes that do not go together.
    """
    _require_same(quantized, reference)
    top, float_top = quantized.argmax(-1), reference.argmax(-1)
    agreement, sqnr = mean_interval((top == float_top).astype(np.float64)), _sqnr_db(reference, quantized)
    if labels is None:
        return ClassComparison(len(top), agreement, sqnr)
    if labels.shape != top.shape:
        raise UsageError(f"labels: {list(labels.shape)} for {len(top)} items; give one for each")
    right, float_right = (top == labels).astype(np.float64), (float_top == labels).astype(np.float64)
    return ClassComparison(
        len(top),
        agreement,
        sqnr,
        accuracy=float(right.mean()),
        float_accuracy=float(float_right.mean()),
        difference=mean_interval(right - float_right),
    )


def compare_embeddings(quantized: Array, reference: Array) -> EmbeddingComparison:
    """Compares embeddings ``[items, size]``.

    Raises:
        UsageError: no item, shapes that do not go together, or an embedding that is 0 and has no direction.
    """
    _require_same(quantized, reference)
    x, y = reference.astype(np.float64), quantized.astype(np.float64)
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    if not lengths.all():
        raise UsageError(f"embeddings: item {int(np.argmin(lengths))} is 0 and has no direction; leave it out")
    cosine = np.minimum((x * y).sum(-1) / lengths, 1.0)
    return EmbeddingComparison(len(cosine), mean_interval(cosine), float(cosine.min()), _sqnr_db(reference, quantized))


def _require_same(quantized: Array, reference: Array) -> None:
    if quantized.shape != reference.shape or quantized.ndim != 2 or not quantized.size:
        raise UsageError(
            f"evaluation: {list(quantized.shape)} and {list(reference.shape)} differ in items; give [items, size]"
        )


def _sqnr_db(reference: Array, quantized: Array) -> float | None:
    x, y = reference.astype(np.float64), quantized.astype(np.float64)
    energy, noise = float(np.square(x).sum()), float(np.square(x - y).sum())
    return 10 * math.log10(energy / noise) if energy > 0 and noise > 0 else None
