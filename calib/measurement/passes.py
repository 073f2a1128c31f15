# SPDX-License-Identifier: Apache-2.0
"""Which tokens the modules that run now work on.

A model may hold models: an encoder and a decoder with tokens of their own, a tower that sees images. Each call of one
begins a *scope*; what is inside belongs to its tokens. An inner model that is handed on the tokens of the outer one,
as ids or as embeddings, shares its scope.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.kernels.plan import RowPlan
from calib.statistics import Observation
from calib.statistics.observation import EXCLUDED

__all__ = ["Passes", "Scope"]

_MEMORY = ("encoder_hidden_states", "encoder_outputs")


@dataclass(eq=False)
class Scope:
    """The tokens of one stack of modules in one forward pass.

    Attributes:
        batch: (rows, tokens) of the tensors inside; None without tokens.
        context: of the tokens; longer than `batch` by `past` where earlier tokens lie in a cache.
        rows: document and domain per row, for tensors that are not laid out by tokens.
        ids: the token ids or embeddings that began it.
        memory: what a decoder attends to: the encoder's output, and the scope that it came from.
        modalities: which tokens stand for something else than text, bool ``[rows, tokens]`` each.
    """

    batch: tuple[int, int] | None = None
    context: Observation | None = None
    past: int = 0
    rows: dict[str, NDArray[Any]] = field(default_factory=dict)
    ids: torch.Tensor | None = None
    memory: tuple[torch.Tensor, Scope] | None = None
    modalities: dict[str, NDArray[np.bool_]] | None = None
    plans: dict[tuple[int, int, bool], RowPlan] = field(default_factory=dict)

    def plan(self, blocks: int, tokens: int, *, aligned: bool) -> RowPlan:
        """The row plan of a layout ``[blocks, tokens, channels]``, made once."""
        plan = self.plans.get((blocks, tokens, aligned))
        if plan is None:
            plan = self.plans[blocks, tokens, aligned] = self._plan(blocks, tokens, aligned=aligned)
        return plan

    def _plan(self, blocks: int, tokens: int, *, aligned: bool) -> RowPlan:
        if aligned and self.context is not None:
            return self.routed(np.arange(blocks * tokens, dtype=np.int64))
        context = Observation.of_shape(blocks, tokens)
        documents = self.rows.get("document")
        if documents is not None and documents.size == blocks:
            domain = self.rows.get("domain", context.domain)
            context = Observation(context.group, documents, domain, context.token_id)
        return RowPlan.of(context)

    def routed(self, rows: NDArray[np.int64]) -> RowPlan:
        """The plan of values whose rows are some tokens of this pass, numbered through."""
        if self.context is None or self.batch is None:
            return RowPlan.of(Observation.of_shape(1, rows.size))
        if self.past:
            block, position = np.divmod(rows, self.batch[1])
            rows = block * (self.past + self.batch[1]) + self.past + position
        plan = RowPlan.routed(self.context, rows)
        if self.modalities is None:
            return plan
        return replace(plan, parts={name: RowPlan.routed(part, rows) for name, part in self._parts().items()})

    def _parts(self) -> dict[str, Observation]:
        """The context of each modality: the same tokens, those of all others left out."""
        context, held = self.context, self.modalities
        assert context is not None
        assert held is not None
        text = ~np.logical_or.reduce([np.zeros(context.group.shape, np.bool_), *held.values()])
        return {
            name: replace(context, group=np.where(mask, context.group, np.uint8(EXCLUDED)))
            for name, mask in {"text": text, **held}.items()
            if mask.any()
        }


class Passes:
    """Follows forward passes: what runs, how many passes ended, how many broke off.

    Args:
        sink_positions: first tokens of a row that are kept apart.
        modality_tokens: token ids that stand for something else than text; see `modalities`.
    """

    def __init__(self, sink_positions: int, modality_tokens: dict[str, int] | None = None) -> None:
        self.sink_positions = sink_positions
        self.modality_tokens = modality_tokens or {}
        self.scope = Scope()
        self.rows = 0
        self.annotation: dict[str, NDArray[Any]] = {}
        self.annotated_passes = 1
        self.finished = True
        self._outer: list[Scope] = []
        self._made: list[tuple[weakref.ref[torch.Tensor], Scope]] = []

    @property
    def depth(self) -> int:
        """How many models run inside each other."""
        return len(self._outer)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, counted: bool) -> bool:
        """A model is called; returns whether it is the outermost one."""
        outermost = not self._outer
        self._outer.append(self.scope)
        if outermost:
            self.finished = False
            self._made.clear()
            self.scope = self._outermost(args, kwargs)
            self.rows += self.scope.rows["document"].size if counted else 0
        else:
            self.scope = self._inner(args, kwargs)
        return outermost

    def end(self, output: Any = None) -> bool:
        """A model returns or raises; returns whether it was the outermost one."""
        inner = self.scope
        self.scope = self._outer.pop()
        if not self._outer:
            self.annotated_passes -= 1
            if self.annotated_passes < 1:
                self.annotation, self.annotated_passes = {}, 1
            self._made.clear()
            self.scope = Scope()
            return True
        if inner.memory is not None and self.scope.memory is None:
            self.scope = inner  # what follows a decoder, its head, works on the decoder's tokens
        first = _first_tensor(output)
        if first is not None:
            self._made.append((weakref.ref(first), inner))
        return False

    def _documents(self, rows: int) -> NDArray[np.int64]:
        given = self.annotation.get("document")
        return np.arange(self.rows, self.rows + rows) if given is None else given.astype(np.int64)

    def _outermost(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scope:
        tokens = _token_ids(args, kwargs)
        if tokens is None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.ndim), None)
            rows = 0 if first is None else first.shape[0]
        else:
            rows = tokens.shape[0]
        self.annotation.setdefault("document", self._documents(rows))
        return self._of_tokens(tokens, kwargs)

    def _inner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scope:
        outer = self.scope
        tokens = _token_ids(args, kwargs, decoder=False)
        memory = self._memory(kwargs)
        if memory is None and (tokens is None or tokens is outer.ids):
            if tokens is not None:
                return outer
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.ndim), None)
            same = first is not None and first.ndim == 3 and tuple(first.shape[:2]) == outer.batch
            return outer if same else self._of_tokens(None, kwargs)
        if memory is None and tokens is not None and tokens.is_floating_point() and tuple(tokens.shape) == outer.batch:
            return outer  # the embeddings of the outer model's tokens
        scope = self._of_tokens(tokens, kwargs)
        scope.memory = memory
        return scope

    def _memory(self, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Scope] | None:
        """The tensor that a decoder attends to and the scope that it was made in."""
        tensor = next((t for name in _MEMORY if (t := _first_tensor(kwargs.get(name))) is not None), None)
        if tensor is None:
            return None
        made = next((scope for out, scope in self._made if out() is tensor), None)
        if made is None:
            made = Scope(rows=self._rows_of(tensor.shape[0]))
            mask = kwargs.get("encoder_attention_mask")
            if isinstance(mask, torch.Tensor) and mask.ndim == 2 and tensor.ndim == 3:
                made = self._of_tokens(torch.full(tensor.shape[:2], -1), {"attention_mask": mask})
        return tensor, made

    def _rows_of(self, rows: int) -> dict[str, NDArray[Any]]:
        given = {name: array for name, array in self.annotation.items() if name in ("document", "domain")}
        return {name: array for name, array in given.items() if array.size == rows}

    def _of_tokens(self, tokens: torch.Tensor | None, kwargs: dict[str, Any]) -> Scope:
        rows: dict[str, NDArray[Any]] = {n: a for n, a in self.annotation.items() if n in ("document", "domain")}
        if tokens is None:
            return Scope(rows=rows)
        batch = (tokens.shape[0], tokens.shape[1])
        past = _past_tokens(kwargs)
        shape = (batch[0], past + batch[1])
        valid = self.annotation.get("valid")
        mask = kwargs.get("attention_mask")
        if valid is not None and valid.shape != batch:
            valid = None
        if valid is not None and past:
            valid = np.concatenate([np.ones((batch[0], past), np.bool_), valid], axis=1)
        if valid is None and isinstance(mask, torch.Tensor) and mask.ndim == 2 and tuple(mask.shape) == shape:
            valid = mask.bool().cpu().numpy()
        ids = np.full(shape, -1, np.int64)
        if not tokens.is_floating_point():
            ids[:, past:] = tokens.cpu().numpy()
        own = {name: array for name, array in rows.items() if array.size == batch[0]}
        if "document" in own:
            own["document"] = own["document"].astype(np.int64)
        context = Observation.of_tokens(ids, valid=valid, sink_positions=self.sink_positions, **own)
        held = {name: ids == token for name, token in self.modality_tokens.items()} if self.modality_tokens else None
        return Scope(batch, context, past, rows, tokens, modalities=held)


def _past_tokens(kwargs: dict[str, Any]) -> int:
    """How many tokens lie in the cache that a model is given."""
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 0


def _first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor that a model returns first."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    return None


def _token_ids(args: tuple[Any, ...], kwargs: dict[str, Any], *, decoder: bool = True) -> torch.Tensor | None:
    """Token ids ``[rows, tokens]`` of a forward pass, or embeddings in their place."""
    for name in ("input_ids", "decoder_input_ids", "inputs_embeds") if decoder else ("input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor):
            return value if value.ndim == 2 else value[..., 0]
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 2 and not args[0].is_floating_point():
        return args[0]
    return None
