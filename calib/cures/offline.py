# SPDX-License-Identifier: Apache-2.0
"""`OfflineRotation`: the residual stream, and the values of each head, in another basis; nothing is computed online.

QuaRot (Ashkboos et al. 2024, sections 3 and 4.1, after SliceGPT, Ashkboos et al. 2024): an RMS norm without its weight
commutes with an orthogonal R. So its weight moves into the layers that read it, what writes the stream is multiplied
by R, and what reads it by R as well, whose transpose undoes it. A LayerNorm commutes with an R that keeps the mean,
``1 R = 1``; its bias b stays in it, as ``(b / weight) R``. The result is an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from calib.cures.find import find_pairs
from calib.cures.fold import Folded
from calib.cures.input_rotation import on_columns
from calib.cures.linear import matrix_of
from calib.cures.pairs import Pair, Pairs
from calib.cures.residual import Reader, ResidualStream, find_residual
from calib.cures.rotate import Rotated
from calib.cures.rotation import Rotation
from calib.cures.scope import example_inputs, tensors_in
from calib.cures.value_heads import ValueHeads, find_value_heads
from calib.errors import ModelError, UsageError
from calib.models.evaluating import evaluating
from calib.schema.scales import CureRecord

__all__ = ["OfflineRotation"]

_LIMIT = {torch.float32: 1e-3, torch.float64: 1e-3}
_LIMIT_HALF = 0.25
"""Largest change of the logits, root mean square of the difference by that of the logits. A layer that was missed
changes them by 0.02 to 1 (tiny models of four families); the new rounding of half-precision weights alone by 0.01 to
0.04 over six layers, so that there only what is badly wrong shows. Blocks are probed in float32 whatever the dtype."""

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class OfflineRotation:
    """Rotations that weights alone can hold: decided, not yet applied.

    Attributes:
        stream: what reads and writes the residual stream, or None to leave it.
        heads: values and output projections that are rotated head by head.
        seed: of the random signs.
        untie: whether the output head may get a weight of its own.
    """

    stream: ResidualStream | None
    heads: tuple[ValueHeads, ...]
    seed: int = 0
    untie: bool = False

    @classmethod
    def find(
        cls,
        model: nn.Module,
        pairs: Pairs,
        *,
        residual: bool = True,
        heads: bool = True,
        seed: int = 0,
        untie: bool = False,
        example: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ) -> Self:
        """Finds in a model what can be rotated.

        Args:
            model: a transformers language model; it is only run.
            pairs: of this model.
            residual: rotate the residual stream.
            heads: rotate the values of each head.
            seed: see the class.
            untie: see the class.
            example: see `find_pairs`.

        Raises:
            ModelError: the stream cannot be rotated; the message names the layer.
            UsageError: there is nothing to rotate, or the head is tied to the embedding and may not be untied.
        """
        stream = find_residual(model, pairs, example) if residual else None
        rotation = cls(stream, find_value_heads(model, pairs, example) if heads else (), seed, untie)
        rotation._check_tied()
        if stream is None and not rotation.heads:
            raise UsageError(
                f"{type(model).__name__}: no values were found to rotate; rotate its residual stream or inputs"
            )
        return rotation

    def apply(self, model: nn.Module, example: torch.Tensor | Mapping[str, torch.Tensor] | None = None) -> Rotated:
        """Rotates weights in place, in float32 with one rounding, and compares the logits of an example.

        Raises:
            ModelError: a weight is shared with a module that does not take part, does not fit its dtype, or the logits
                differ; the model is as it was.
            UsageError: the head is tied to the embedding and may not be untied.
        """
        self._check_tied()
        inputs = example if isinstance(example, Mapping) else example_inputs(model, example)
        expected = _logits(model, inputs)
        undo = ExitStack()
        try:
            if self.stream is not None and self.stream.tied:
                undo.callback(_untied(model, self.stream.head))
            changes = self._changes(model)
            _check_shared(model, changes)
            folded = Folded.write(model, _changed(model, changes), "after rotation; load the model in a wider dtype")
        except BaseException:
            undo.close()
            raise
        rotated = Rotated(folded, {}, undo)
        try:
            self._compare(model, expected, _logits(model, inputs))
        except BaseException:
            rotated.revert()
            raise
        return rotated

    @classmethod
    def of_record(cls, model: nn.Module, record: CureRecord) -> Self:
        """The rotation that `record` made an entry of.

        Raises:
            ModelError, UsageError: the model is not the one that the entry is of.
        """
        found = record.settings
        rotation = cls.find(
            model,
            find_pairs(model),
            residual=found["residual"] is True,
            heads=bool(found["heads"]),
            seed=int(str(found["signs_seed"])),
            untie=found["untied"] is True,
        )
        if rotation.record() != record:
            raise ModelError(f"{type(model).__name__}: can be rotated in another way than was recorded; quantize again")
        return rotation

    def mixes(self, pair: Pair) -> bool:
        """Whether the channels of a pair of this model are mixed by it."""
        norms = {reader.norm for reader in self.stream.readers} if self.stream is not None else set()
        return pair.producer in norms or any(heads.pair.name == pair.name for heads in self.heads)

    def record(self) -> CureRecord:
        """An entry of `cures` in scales.json."""
        parts = ([] if self.stream is None else ["the residual stream"]) + (
            [f"the heads of {len(self.heads)} value projections"] if self.heads else []
        )
        return CureRecord(
            kind="rotate",
            summary=f"{' and '.join(parts)} rotated in the weights",
            settings={
                "where": "weights",
                "residual": self.stream is not None,
                "heads": [heads.pair.name for heads in self.heads],
                "untied": self.stream is not None and self.stream.tied,
                "signs_seed": self.seed,
            },
        )

    def _check_tied(self) -> None:
        if self.stream is not None and self.stream.tied and not self.untie:
            norm = self.stream.readers[-1].norm
            raise UsageError(
                f"{self.stream.head}: shares its weight with {self.stream.embedding}, so that of {norm} cannot move "
                "into it; pass untie=True to give the head a copy of its own"
            )

    def _changes(self, model: nn.Module) -> dict[str, list[Change]]:
        """By parameter, what is done to it: to float32 ``[outputs, inputs]``, or ``[outputs]`` of a bias."""
        changes = _Changes(model)
        if self.stream is not None:
            rotate = Rotation(self.stream.width, self.seed, keeps_mean=self.stream.keeps_mean).rotate
            for table in (self.stream.embedding, *self.stream.places):
                changes.add(f"{table}.weight", rotate)
            for reader in self.stream.readers:
                multiplier = _multiplier(model, reader)
                for parameter, change in _of_norm(model, reader, multiplier, rotate):
                    changes.add(f"{reader.norm}.{parameter}", change)
                for name in reader.consumers:
                    changes.add_columns(name, partial(torch.mul, multiplier))
                    changes.add_columns(name, rotate)
            for name in self.stream.writers:
                changes.add_rows(name, rotate)
        for heads in self.heads:
            rotation = Rotation(heads.size, self.seed)
            changes.add_rows(heads.pair.producer, partial(heads.rotate_rows, rotation=rotation))
            for consumer in heads.pair.consumers:
                changes.add_columns(consumer.module, partial(heads.rotate_columns, rotation=rotation))
        return changes.steps

    @staticmethod
    def _compare(model: nn.Module, expected: torch.Tensor, result: torch.Tensor) -> None:
        limit = _LIMIT.get(next(p.dtype for p in model.parameters() if p.is_floating_point()), _LIMIT_HALF)
        size = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
        error = float((result - expected).square().mean().sqrt() / size)
        if not error <= limit:
            raise ModelError(
                f"{type(model).__name__}: its logits change by {error:.2g} of their size when it is rotated: something "
                "reads or writes the residual stream unseen; rotate inputs online"
            )


class _Changes:
    """Steps by parameter, in the order in which they are added."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: dict[str, list[Change]] = {}
        self._model = model

    def add(self, name: str, change: Change) -> None:
        """One more step for a parameter."""
        self.steps.setdefault(name, []).append(change)

    def add_rows(self, module: str, change: Change) -> None:
        """Of what a linear layer returns, bias included."""
        self.add(f"{module}.weight", lambda w: change(w.T).T)
        if self._model.get_submodule(module)._parameters.get("bias") is not None:
            self.add(f"{module}.bias", change)

    def add_columns(self, module: str, change: Change) -> None:
        """Of what a linear layer reads."""
        self.add(f"{module}.weight", partial(on_columns, self._model.get_submodule(module), change=change))


def _changed(model: nn.Module, changes: Mapping[str, list[Change]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, steps in changes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        value = model.get_parameter(name).detach().float()
        if value.ndim > 1:
            value = matrix_of(module, value)
        for step in steps:
            value = step(value)
        yield name, matrix_of(module, value) if value.ndim > 1 else value


def _multiplier(model: nn.Module, reader: Reader) -> torch.Tensor:
    weight = model.get_submodule(reader.norm).get_parameter("weight").detach().float()
    return 1 + weight if reader.rule == "norm_plus_one" else weight.clone()


def _of_norm(
    model: nn.Module, reader: Reader, multiplier: torch.Tensor, rotate: Change
) -> Iterator[tuple[str, Change]]:
    """What is left of a norm's parameters once its readers multiply by its weight."""
    yield "weight", torch.zeros_like if reader.rule == "norm_plus_one" else torch.ones_like
    bias = model.get_submodule(reader.norm)._parameters.get("bias")
    if bias is None:
        return
    silent = multiplier == 0
    if bool((silent & (bias != 0)).any()):
        raise ModelError(f"{reader.norm}: adds a bias where its weight is 0; rotate inputs online")
    yield "bias", lambda value: rotate(value / torch.where(silent, 1.0, multiplier))


def _check_shared(model: nn.Module, changes: Mapping[str, object]) -> None:
    """Two names of one parameter, of which the change of one would be seen under the other."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for held in names.values():
        if len(held) > 1 and any(name in changes for name in held):
            raise ModelError(
                f"{held[0]}: is shared with {held[1]}, so it cannot be rotated for both; rotate inputs online"
            )


def _untied(model: nn.Module, head: str) -> Callable[[], None]:
    """Gives the head a copy of its weight; returns what takes it back."""
    module = model.get_submodule(head)
    own = module.get_parameter("weight")
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    tying = [c for c in configs.values() if getattr(c, "tie_word_embeddings", False)]
    module._parameters["weight"] = nn.Parameter(own.detach().clone(), own.requires_grad)
    for config in tying:
        config.tie_word_embeddings = False  # or a reader of the saved model would tie them again

    def tie() -> None:
        module._parameters["weight"] = own
        for config in tying:
            config.tie_word_embeddings = True

    return tie


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        return tensors_in(model(**inputs))[0].float()
