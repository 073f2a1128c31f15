# SPDX-License-Identifier: Apache-2.0
"""`resampled`: calibration text that the model writes itself, for channels that a short text leaves silent.

A feed-forward neuron may fire for a handful of words only. Where the calibration text has none of them, its range is
too small, and clipping what exceeds it costs more than all rounding. The model itself knows which other words could
have stood at each place: samples of its prediction, all places at once, cost one forward pass and name far more words
than the text has. (Text generated token by token is used for calibration since LLM-QAT, Liu et al. 2023, arXiv
2305.17888.)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calib.corpus import TokenBlocks
from calib.errors import UsageError
from calib.models import OpenedModel
from calib.models.takes import text_inputs

__all__ = ["resampled"]


def resampled(opened: OpenedModel, blocks: TokenBlocks, *, times: int = 2, seed: int = 0) -> TokenBlocks:
    """Blocks in which each token is a sample of what the model expects there, given the text before it.

    The model is not changed: what says that ranges cover such blocks is their source in the provenance of the corpus.
    The first token of a row stays. Special tokens are not sampled, but where the text has them.

    Args:
        opened: a model that predicts the next token, in float.
        blocks: of equal length.
        times: samples per block.
        seed: of a generator on the CPU; the same seed, model and device give the same blocks.

    Raises:
        UsageError: `times` is not positive, or the model gives no logits for each token.
    """
    if times < 1:
        raise UsageError(f"times {times}: not positive; give 1 or more samples per block")
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(getattr(opened.tokenizer, "all_special_ids", None) or [], dtype=torch.int64)
    rows = []
    with torch.no_grad():
        for ids in torch.from_numpy(blocks.input_ids).split(1):
            logits = getattr(opened.model(**text_inputs(opened.model, ids)), "logits", None)
            if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != ids.shape:
                raise UsageError(f"{type(opened.model).__name__}: predicts no tokens; leave `resample` out")
            expected = logits[0, :-1].float().cpu()
            expected[:, special[special < expected.shape[-1]]] = -torch.inf
            picked = torch.multinomial(expected.softmax(-1), times, replacement=True, generator=generator)
            rows.append(_in_place(ids[0], picked.T, special))
    repeated = blocks.select(np.repeat(np.arange(len(blocks)), times))
    return repeated.rewritten(np.concatenate(rows), f"resampled, seed {seed}")


def _in_place(ids: torch.Tensor, picked: torch.Tensor, special: torch.Tensor) -> NDArray[np.int64]:
    """Samples ``[times, tokens - 1]`` behind the first token; special tokens of the text stay."""
    row = ids.expand(picked.shape[0], -1).clone()
    row[:, 1:] = torch.where(torch.isin(ids[1:], special), row[:, 1:], picked)
    result: NDArray[np.int64] = row.numpy()
    return result
