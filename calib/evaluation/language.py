# SPDX-License-Identifier: Apache-2.0
"""What a language model loses: negative log-likelihood, KL to the float model, and top-1 agreement, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.errors import GateError, UsageError
from calib.models.device import input_device

__all__ = ["TokenScores", "compare_many", "compare_tokens", "score_tokens"]

Context = Callable[[], AbstractContextManager[object]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of the tokens of blocks; token t is predicted from all before it, so the first of a block has no score.

    Attributes:
        nll: negative log-likelihood in nats, float64 ``[blocks, tokens - 1]``.
        kl: KL(float ‖ quantized) in nats at the same positions; None for the float model itself.
        top1: whether both models put the same token first, bool; None likewise.
    """

    nll: NDArray[np.float64]
    kl: NDArray[np.float64] | None = None
    top1: NDArray[np.bool_] | None = None

    @property
    def perplexity(self) -> float:
        """Exp of the mean over all tokens."""
        return float(np.exp(self.nll.mean()))


def score_tokens(
    model: nn.Module,
    blocks: NDArray[np.int64],
    *,
    prefix: Sequence[int] = (),
    batch_size: int = 4,
    progress: Progress | None = None,
) -> TokenScores:
    """Scores of one model, as it is: float, or inside of a `QuantizedModel`.

    Args:
        model: causal language model with ``logits``.
        blocks: int64 ``[blocks, tokens]``, without padding.
        prefix: token ids in front of each block; not scored.
        batch_size: blocks of a forward pass.
        progress: called with (blocks done, blocks in all).

    Raises:
        UsageError: fewer than two tokens per block.
        GateError: a logit was NaN.
    """
    nll = []
    for ids in _batches(blocks, prefix, batch_size, input_device(model)):
        nll += [_nll(row, targets) for row, targets in _rows(model, ids, len(prefix))]
        if progress is not None:
            progress(len(nll), len(blocks))
    return TokenScores(np.stack(nll))


def compare_tokens(
    model: nn.Module,
    blocks: NDArray[np.int64],
    quantized: Context,
    *,
    float_context: Context = nullcontext,
    prefix: Sequence[int] = (),
    batch_size: int = 4,
    progress: Progress | None = None,
) -> tuple[TokenScores, TokenScores]:
    """Scores of the float model and of the quantized one, batch by batch, so that no logits need to be stored.

    Args:
        model: causal language model with ``logits``.
        blocks: as in `score_tokens`.
        quantized: makes a context in which the model is quantized; entered once per batch.
        float_context: the same for the float model.
        prefix: as in `score_tokens`; both models see it.
        batch_size: blocks of a forward pass.
        progress: called with (blocks done, blocks in all).

    Returns:
        The float scores, and those of the quantized model with KL and agreement.

    Raises:
        UsageError: fewer than two tokens per block.
        GateError: a logit was NaN.
    """
    reference, found = compare_many(
        model,
        blocks,
        {"quantized": quantized},
        float_context=float_context,
        prefix=prefix,
        batch_size=batch_size,
        progress=progress,
    )
    return reference, found["quantized"]


def compare_many(
    model: nn.Module,
    blocks: NDArray[np.int64],
    variants: Mapping[str, Context],
    *,
    float_context: Context = nullcontext,
    prefix: Sequence[int] = (),
    batch_size: int = 4,
    progress: Progress | None = None,
) -> tuple[TokenScores, dict[str, TokenScores]]:
    """Scores of the float model and of several quantized ones; like `compare_tokens`, with one float pass for all.

    Args:
        model: causal language model with ``logits``.
        blocks: as in `score_tokens`.
        variants: name -> makes a context in which the model is quantized; entered once per batch.
        float_context: the same for the float model.
        prefix: as in `score_tokens`; all see it.
        batch_size: blocks of a forward pass.
        progress: called with (blocks done, blocks in all).

    Returns:
        The float scores, and those of each variant with KL and agreement.

    Raises:
        UsageError: fewer than two tokens per block.
        GateError: a logit was NaN.
    """
    plain: list[NDArray[np.float64]] = []
    rows: dict[str, list[_Row]] = {name: [] for name in variants}
    for ids in _batches(blocks, prefix, batch_size, input_device(model)):
        with float_context():
            expected = [(torch.log_softmax(row, -1), targets) for row, targets in _rows(model, ids, len(prefix))]
        plain += [_picked(reference, targets) for reference, targets in expected]
        for name, quantized in variants.items():
            with quantized():
                pairs = zip(expected, _rows(model, ids, len(prefix)), strict=True)
                rows[name] += [_compare(reference, row, targets) for (reference, targets), (row, _) in pairs]
        del expected
        if progress is not None:
            progress(len(plain), len(blocks))
    return TokenScores(np.stack(plain)), {
        name: TokenScores(*(np.stack(column) for column in zip(*found, strict=True))) for name, found in rows.items()
    }


_Row = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


def _compare(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> _Row:
    """Negative log-likelihood, KL and agreement of one row."""
    found = torch.log_softmax(logits, -1)
    terms = reference.exp() * (reference - found)
    # a token that both models rule out has a difference of infinities, and no part in the sum
    terms.masked_fill_(reference == -torch.inf, 0.0)
    kl: NDArray[np.float64] = terms.sum(-1).double().clamp(min=0).cpu().numpy()
    return _picked(found, targets), kl, (reference.argmax(-1) == found.argmax(-1)).cpu().numpy()


def _batches(
    blocks: NDArray[np.int64], prefix: Sequence[int], batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    if blocks.ndim != 2 or blocks.shape[1] < 2 or not blocks.size:
        raise UsageError(f"evaluation: blocks {list(blocks.shape)} hold nothing to predict; give [blocks, 2 or more]")
    front = np.broadcast_to(np.asarray(prefix, np.int64), (len(blocks), len(prefix)))
    rows = torch.from_numpy(np.concatenate([front, blocks], 1))
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size].to(device)


def _rows(model: nn.Module, ids: torch.Tensor, prefix: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits float32 ``[tokens - 1, vocabulary]`` of each row and the tokens that followed."""
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise UsageError(f"{type(model).__name__}: gives no logits; evaluate a causal language model")
    for row, tokens in zip(logits, ids.to(logits.device), strict=True):
        yield row[prefix:-1].float(), tokens[prefix + 1 :]


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> NDArray[np.float64]:
    return _finite(nn.functional.cross_entropy(logits, targets, reduction="none"))


def _picked(log_probabilities: torch.Tensor, targets: torch.Tensor) -> NDArray[np.float64]:
    return _finite(-log_probabilities.gather(-1, targets[:, None])[:, 0])


def _finite(nll: torch.Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = nll.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise GateError("evaluation: the model gives NaN or infinite logits; check scales and dtype")
    return values
