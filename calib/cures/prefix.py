# SPDX-License-Identifier: Apache-2.0
"""`Prefix`: tokens in front of every sequence that take the attention sink, and with it the massive activations.

Many language models park attention on the first token, whose activations are then a hundred times larger than all
others (Sun et al. 2024, arXiv 2402.17762) and fix the range of a static scale. Tokens that are always the same can be
computed once, in float, and kept as cached keys and values: no range need cover them (as in CushionCache, Son et al.
2024). Here the tokens are found by their effect on the ranges of all other positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calib.corpus import TokenBlocks
from calib.errors import ModelError, UsageError
from calib.measurement.engine import MeasureOptions, measure
from calib.measurement.failure import explained
from calib.models import OpenedModel
from calib.models.device import input_device
from calib.models.evaluating import evaluating
from calib.models.takes import text_inputs
from calib.schema.scales import CureRecord
from calib.statistics.observation import REST

__all__ = ["Prefix", "find_prefixes", "prefix_candidates", "room_for_prefix"]

_MARKS = (".", "\n", ",", ":", "(", "\n\n", " the", " and")
"""Marks and words that occur everywhere: models learn to use such tokens as sinks."""
_FREQUENT = 12
_PROBED = (2, 64)  # blocks and tokens of a probe: peaks behind the sink show within few tokens
_SECOND = 0.5  # of the candidates, the better ones, that may also be the second token
_GAIN = 0.05
"""Least fall of the mean log2 range: below it the model has no sink that a prefix takes."""


@dataclass(frozen=True)
class Prefix:
    """Tokens in front of every sequence.

    Attributes:
        token_ids: at least one.
        text: what they say, for people.
        log2_range: mean log2 of the largest magnitude of linear inputs behind it; lower is better.
    """

    token_ids: tuple[int, ...]
    text: str
    log2_range: float

    def record(self) -> CureRecord:
        """An entry of `cures` in scales.json."""
        return CureRecord(
            kind="prefix",
            summary=f"{len(self.token_ids)} token(s) {self.text!r} in front of every sequence, kept in float",
            needs="prefix",
            settings={"token_ids": list(self.token_ids), "text": self.text},
        )


def prefix_candidates(blocks: TokenBlocks, tokenizer: Any | None) -> list[int]:
    """Tokens that may become a sink: special ones, punctuation, and the most frequent ones of the corpus.

    Args:
        blocks: the corpus.
        tokenizer: of the model, or None.
    """
    found: list[int] = []
    if tokenizer is not None:
        found += [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None]
        for mark in _MARKS:
            ids = tokenizer(mark, add_special_tokens=False).input_ids
            if len(ids) == 1:
                found.append(int(ids[0]))
    counts = np.bincount(blocks.input_ids.ravel())
    found += [int(token) for token in np.argsort(-counts, kind="stable")[:_FREQUENT] if counts[token]]
    return list(dict.fromkeys(found))


def find_prefixes(
    opened: OpenedModel,
    blocks: TokenBlocks,
    *,
    candidates: Sequence[int] | None = None,
    most_tokens: int = 2,
    keep: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prefix]:
    """The best prefixes, found greedily: the ranges of linear inputs behind each candidate, on a few short blocks.

    Args:
        opened: a language model.
        blocks: calibration blocks; a few are used.
        candidates: token ids to try; see `prefix_candidates`.
        most_tokens: length of the longest prefix tried.
        keep: how many to return.
        progress: called with (probes done, probes in all).

    Returns:
        Best first; empty if none lowers the ranges by enough, for this model has no sink that a prefix takes, or if the
        blocks fill all positions that the model has.

    Raises:
        UsageError: a candidate is outside of the vocabulary.
    """
    tried = list(prefix_candidates(blocks, opened.tokenizer) if candidates is None else candidates)
    embedding: Any = getattr(opened.model, "get_input_embeddings", lambda: None)()
    vocabulary = int(embedding.weight.shape[0])
    for token in tried:
        if not 0 <= token < vocabulary:
            raise UsageError(f"prefix: token {token} is outside of the vocabulary of {vocabulary}; choose another one")
    most_tokens = room_for_prefix(opened, blocks, most_tokens)
    if not most_tokens:
        return []
    rows, tokens = _PROBED
    probe = blocks.select(range(min(rows, len(blocks)))).truncated(tokens)
    plain = _log2_range(opened, probe, ())
    found: list[Prefix] = []
    beginning: tuple[int, ...] = ()
    later = math.ceil(_SECOND * len(tried))
    total, done = len(tried) + (most_tokens - 1) * later, 0
    for _ in range(most_tokens):
        scored = []
        for token in tried:
            ids = (*beginning, token)
            scored.append(Prefix(ids, _text(opened.tokenizer, ids), _log2_range(opened, probe, ids)))
            done += 1
            if progress is not None:
                progress(done, total)
        scored.sort(key=lambda prefix: prefix.log2_range)
        found += scored[:keep]
        beginning = scored[0].token_ids
        tried = [prefix.token_ids[-1] for prefix in scored[:later]]
    found = [prefix for prefix in found if prefix.log2_range < plain - _GAIN]
    return sorted(found, key=lambda prefix: prefix.log2_range)[:keep]


def room_for_prefix(opened: OpenedModel, blocks: TokenBlocks, most_tokens: int) -> int:
    """How many tokens, up to `most_tokens`, fit in front of the blocks: a model may have so many positions only.

    Beyond what the configuration declares it is tried; not on a GPU, which a position out of range stops for good.
    """
    tokens, model = blocks.input_ids.shape[1], opened.model
    config: Any = getattr(model, "config", None)
    declared = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    device = input_device(model)
    for more in range(most_tokens, 0, -1):
        if isinstance(declared, int) and 0 < tokens + more <= declared:
            return more
        if isinstance(declared, int) and device.type != "cpu":
            continue
        ids = torch.zeros(1, tokens + more, dtype=torch.long, device=device)
        try:
            with torch.no_grad(), evaluating(model), explained(opened, (1, tokens + more)):
                model(**text_inputs(model, ids))
        except ModelError:
            continue
        return more
    return 0


def _log2_range(opened: OpenedModel, blocks: TokenBlocks, prefix: tuple[int, ...]) -> float:
    options = MeasureOptions(
        batch_size=len(blocks),
        sites=["linear_input"],
        statistics="ranges",
        sink_positions=len(prefix),
        weights=False,
    )
    measurement = measure(opened, blocks.with_prefix(prefix), options)
    amax = [site.statistics.range.of(REST).amax for site in measurement.sites.values()]
    return float(np.log2(np.maximum(amax, 1e-30)).mean())


def _text(tokenizer: Any | None, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids)))
