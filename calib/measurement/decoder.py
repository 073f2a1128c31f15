# SPDX-License-Identifier: Apache-2.0
"""What a decoder reads while its encoder-decoder model is measured: targets, or what the model itself would write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.corpus import Rows
from calib.errors import ModelError
from calib.measurement.failure import explained
from calib.models import OpenedModel
from calib.models.evaluating import evaluating
from calib.models.quiet import quiet_transformers

__all__ = ["Decoder"]

GREEDY_TOKENS = 32
"""Most tokens that the model writes where a row has no target and the user names no number."""

Ids = NDArray[np.int64]


class Decoder:
    """Tokens of the decoder, row by row.

    With a target the decoder is taught: it reads the target behind the start token, without the last one. Without,
    the model first writes its own greedily, up to its end token, and then reads them in one pass: the values are
    those of decoding step by step, but for the last bits of arithmetic on other shapes.

    Args:
        opened: an encoder-decoder model.
        tokens: most tokens to write; 0 for 32.
        device: of its inputs.

    Raises:
        ModelError: the configuration names no token that a decoder starts with.
    """

    def __init__(self, opened: OpenedModel, tokens: int, device: torch.device) -> None:
        self._opened, self._tokens, self._device = opened, tokens or GREEDY_TOKENS, device
        self._start, self._end, self._pad = _special_tokens(opened)
        self._labels: dict[int, Ids] = {}
        self._taught: dict[int, bool] = {}

    def prepare(self, blocks: Rows, batches: Sequence[NDArray[Any]]) -> None:
        """Finds out what each row's decoder will read; nothing is measured meanwhile."""
        for rows in batches:
            given = blocks.inputs(rows)
            if any(target is None for target in given.targets):
                written = self._write(given.tensors)
            for place, (row, target) in enumerate(zip(rows, given.targets, strict=True)):
                if int(row) not in self._labels:
                    self._labels[int(row)] = written[place] if target is None else self._without_start(target)
                    self._taught[int(row)] = target is not None

    def inputs(self, rows: NDArray[Any]) -> dict[str, torch.Tensor]:
        """`decoder_input_ids`, int64 ``[rows, tokens]``, and a mask where rows are of unequal length."""
        read = [self._behind_start(self._labels[int(row)]) for row in rows]
        width = max(own.size for own in read)
        ids = np.full((len(read), width), self._pad, np.int64)
        valid = np.zeros((len(read), width), np.int64)
        for place, own in enumerate(read):
            ids[place, : own.size], valid[place, : own.size] = own, 1
        found = {"decoder_input_ids": torch.from_numpy(ids).to(self._device)}
        if not valid.all():
            found["decoder_attention_mask"] = torch.from_numpy(valid).to(self._device)
        return found

    def counts(self, batches: Iterable[NDArray[Any]]) -> dict[str, int]:
        """How many of these rows have a target, and how many read what the model writes."""
        taught = [self._taught[int(row)] for rows in batches for row in rows]
        found = {"target": sum(taught), "greedy": len(taught) - sum(taught)}
        return {name: count for name, count in found.items() if count}

    def _write(self, tensors: dict[str, torch.Tensor]) -> list[Ids]:
        """What the model writes for each row, without the start token, up to the first end token.

        By transformers' own greedy loop: a model's version of it (Whisper's) may leave tokens out of what it returns.
        """
        from transformers import GenerationMixin

        model: Any = self._opened.model
        inputs = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        shape = tuple(next(iter(inputs.values())).shape)
        with torch.no_grad(), evaluating(model), quiet_transformers(), explained(self._opened, shape):
            out = GenerationMixin.generate(
                model,
                **inputs,
                max_new_tokens=self._tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=False,
            )
        return [self._cut(row) for row in out.cpu().numpy()]

    def _behind_start(self, labels: Ids) -> Ids:
        """The start token and all labels but the last, which is never read."""
        return np.concatenate([np.array([self._start], np.int64), labels[:-1]])

    def _without_start(self, target: Ids) -> Ids:
        """Some tokenizers begin a target with the start token itself."""
        return target[1:] if target.size and target[0] == self._start else target

    def _cut(self, sequence: Ids) -> Ids:
        own = sequence[1:]
        ends = np.flatnonzero(np.isin(own, self._end))
        return np.asarray(own[: ends[0] + 1] if ends.size else own, np.int64)


def _special_tokens(opened: OpenedModel) -> tuple[int, list[int], int]:
    """Start, end and padding token of a decoder."""
    model: Any = opened.model
    places = [getattr(model, "generation_config", None), model.config, *_inner(model.config)]

    def first(name: str) -> Any:
        return next((value for place in places if (value := getattr(place, name, None)) is not None), None)

    start = first("decoder_start_token_id")
    start = first("bos_token_id") if start is None else start
    if start is None:
        raise ModelError(
            f"{opened.provenance.name}: its configuration names no decoder_start_token_id; add it to config.json"
        )
    end = first("eos_token_id")
    pad = first("pad_token_id")
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return int(start), ends, int(pad if isinstance(pad, int) and pad >= 0 else 0)


def _inner(config: Any) -> list[Any]:
    return [part for name in ("decoder", "text_config") if (part := getattr(config, name, None)) is not None]
