# SPDX-License-Identifier: Apache-2.0
"""How two computations of one model are compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.cures.scope import tensors_in

__all__ = ["first_output", "largest_difference", "paired_speed", "token_ids"]


def first_output(output: Any) -> torch.Tensor:
    """Logits, or the last hidden state, of a transformers model; of another output its first tensor."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found
    return tensors_in(output)[0]


def token_ids(model: nn.Module, rows: int = 2, tokens: int = 32) -> torch.Tensor:
    """Token ids for a comparison, int64 ``[rows, tokens]``, the same in every run."""
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, min(tokens, longest) if longest > 0 else tokens), generator=generator)


def largest_difference(first: Any, second: Any) -> float:
    """max|a - b| / max|b|; infinite if either holds NaN."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))


def paired_speed(slow: Callable[[], object], fast: Callable[[], object], pairs: int = 15) -> list[float]:
    """Ratios of times of two functions, run in turn; two runs before the first count do not."""
    ratios = []
    for number in range(-2, pairs):
        begin = time.perf_counter()
        slow()
        between = time.perf_counter()
        fast()
        end = time.perf_counter()
        if number >= 0:
            ratios.append((between - begin) / (end - between))
    return ratios
