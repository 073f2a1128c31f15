# SPDX-License-Identifier: Apache-2.0
"""`Judge`: how far a changed model's outputs are from those of the float model, on blocks kept for that.

Local errors mislead: what a rounding error costs is decided by the layers behind it. So candidates are compared by what
comes out of the whole model: the Kullback-Leibler divergence of the next-token distribution where there is one, else
the relative squared error of the output. The likelihood of the text, which users ask for, decides whether a target is
met and nothing else: its differences between two candidates are as large as those of the divergence, and several
times as noisy (benchmarks/candidate_noise.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_rel
from torch import nn

from calib.corpus import TokenBlocks
from calib.errors import GateError, UsageError
from calib.evaluation.interval import Interval, mean_interval, perplexity_ratio
from calib.models.device import input_device
from calib.models.takes import text_inputs
from calib.models.tasks import task_of_class

__all__ = ["Judge", "Score"]

_MOST_BYTES = 1 << 30
"""Of reference outputs that are kept; rows beyond are not judged."""
_HOPELESS = 0.25
"""Of a rival's divergence on the same blocks: what lies further behind, the others would not make up for."""
_SURELY = 0.95
"""Of being worse than a rival, by a paired t-test on the blocks so far: enough to spare the others."""
_AT_ONCE = 1 << 22
"""Logits that are compared in one go, 16 MB in float32: they stay in cache through all steps."""


@dataclass(frozen=True, eq=False)
class Score:
    """One model, judged.

    Attributes:
        divergence: per block, float64 ``[blocks]``; 0 for the float model. Nats per token, or a relative squared error.
        nll: negative log-likelihood per token, float64 ``[blocks, tokens]``; None if the model predicts no next tokens.
    """

    divergence: NDArray[np.float64]
    nll: NDArray[np.float64] | None

    @property
    def mean(self) -> float:
        """Mean divergence."""
        return float(self.divergence.mean())

    def interval(self) -> Interval:
        """The same with a 90 % interval over blocks."""
        return mean_interval(self.divergence)

    def surely_worse(self, rival: NDArray[np.float64]) -> bool:
        """Whether it is worse than a rival beyond doubt, on the blocks that it was judged on.

        Args:
            rival: its divergences on the same blocks, in the same order, and perhaps on further ones.
        """
        rival = rival[: self.divergence.size]
        if self.mean > (1 + _HOPELESS) * rival.mean():
            return True
        if self.divergence.size < 2:
            return False
        return bool(ttest_rel(self.divergence, rival, alternative="greater").pvalue < 1 - _SURELY)

    def ratio(self, reference: NDArray[np.float64] | None) -> Interval | None:
        """Perplexity over that of a reference on the same tokens, 90 % interval; None if there is none."""
        if self.nll is None or reference is None:
            return None
        return perplexity_ratio(self.nll, reference[: len(self.nll)])


class Judge:
    """Holds what the float model says about some blocks; made before anything is changed.

    Args:
        model: the float model.
        blocks: of equal length.
        prefix: token ids in front of each block, seen by the float model too, and not judged.
        batch_size: blocks of a forward pass.

    Attributes:
        reference_nll: of the float model, float64 ``[blocks, tokens]``; None if it predicts no next tokens.

    Raises:
        UsageError: blocks have different lengths, or the model gives no output to compare.
    """

    def __init__(
        self, model: nn.Module, blocks: TokenBlocks, *, prefix: Sequence[int] = (), batch_size: int = 4
    ) -> None:
        if (blocks.lengths != blocks.input_ids.shape[1]).any():
            raise UsageError("cures: blocks of equal length are needed to compare models; use --layout blocks")
        self._model = model
        self._skip = len(prefix)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._predicts = head is not None and task_of_class(type(model)) != "fill-mask"
        rows = torch.from_numpy(blocks.with_prefix(prefix).input_ids)
        self._batches = list(rows.split(batch_size))
        self._references: list[torch.Tensor] = []
        held = 0
        nll = []
        for number, ids in enumerate(self._batches):
            output = self._run(ids)
            held += output.numel() * output.element_size()
            if number and held > _MOST_BYTES:
                break
            if self._predicts:
                output = torch.log_softmax(output, -1)
                nll.append(-_picked(output, self._targets(ids)).double().cpu().numpy())
            self._references.append(output)
        self._batches = self._batches[: len(self._references)]
        self.reference_nll = np.concatenate(nll) if nll else None

    @property
    def blocks(self) -> int:
        """How many blocks are judged."""
        return sum(len(batch) for batch in self._batches)

    def judge(self, rival: NDArray[np.float64] | None = None) -> Score:
        """Judges the model as it is now.

        Args:
            rival: divergences of another candidate on these blocks. Once this one is surely worse on the blocks so
                far, the others are spared, and the score covers those so far.

        Raises:
            GateError: an output is NaN.
        """
        divergence, nll = [], []
        for ids, reference in zip(self._batches, self._references, strict=True):
            output = self._run(ids)
            if self._predicts:
                per_token, picked = _compared(reference, output, self._targets(ids))
                divergence.append(per_token.double().clamp(min=0).mean(-1))
                nll.append(-picked.double().cpu().numpy())
            else:
                error = (reference - output).double().square().flatten(1).sum(1)
                divergence.append(error / reference.double().square().flatten(1).sum(1))
            score = self._score(divergence, nll)
            if rival is not None and score.surely_worse(rival):
                break
        return score

    def _score(self, divergence: list[torch.Tensor], nll: list[NDArray[np.float64]]) -> Score:
        values: NDArray[np.float64] = torch.cat(divergence).cpu().numpy()
        if not np.isfinite(values).all():
            raise GateError("cures: a candidate gives NaN or infinite outputs; check the dtype of the model")
        return Score(values, np.concatenate(nll) if nll else None)

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        model = self._model
        with torch.no_grad():
            output: Any = model(**text_inputs(model, ids))
        found = getattr(output, "logits", None)
        if found is None:
            found = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else None)
        if not isinstance(found, torch.Tensor):
            raise UsageError(f"{type(model).__name__}: gives neither logits nor hidden states; cure it in Python")
        per_token = found.ndim == 3 and found.shape[1] == ids.shape[1]
        return (found[:, self._skip : -1] if self._predicts and per_token else found).float()

    def _targets(self, ids: torch.Tensor) -> torch.Tensor:
        """The tokens that come next, ``[rows, tokens]``."""
        return ids[:, self._skip + 1 :].to(input_device(self._model))


def _compared(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence from the reference, and log-probabilities of the targets; both float32 ``[rows, tokens]``."""
    divergence = torch.empty(logits.shape[:-1], device=logits.device)
    picked = torch.empty_like(divergence)
    tokens = max(1, _AT_ONCE // (logits.shape[0] * logits.shape[-1]))
    for start in range(0, logits.shape[1], tokens):
        part = slice(start, start + tokens)
        exact, found = reference[:, part], torch.log_softmax(logits[:, part], -1)
        divergence[:, part] = (exact.exp() * (exact - found)).sum(-1)
        picked[:, part] = _picked(found, targets[:, part])
    return divergence, picked


def _picked(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_probabilities.gather(-1, targets.to(log_probabilities.device)[..., None])[..., 0]
