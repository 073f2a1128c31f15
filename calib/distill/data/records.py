# SPDX-License-Identifier: Apache-2.0
"""Labelled samples as they were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from calib.errors import CorpusError

__all__ = ["Records", "make_records"]


@dataclass(frozen=True)
class Records:
    """Inputs with one label each.

    `inputs` are texts, uint8 images `[C, H, W]`, float tensors, or paths and objects that decode to an image; `labels`
    are numbers 0 .. len(class_names) - 1; `class_names` are sorted unless the source has an order of its own.
    """

    inputs: Sequence[Any]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, numbers: Sequence[int]) -> Records:
        """The samples with these numbers, in this order."""
        return replace(self, inputs=[self.inputs[n] for n in numbers], labels=tuple(self.labels[n] for n in numbers))

    def renamed(self, label_ids: dict[str, int] | None, source: str = "model") -> Records:
        """Labels in the order of a model that names its classes, where it uses the same names; otherwise unchanged.

        Args:
            label_ids: class name -> output number, as in a transformers configuration.
            source: how an error calls the model.

        Raises:
            CorpusError: some of the names are the model's and some are not.
        """
        if not label_ids:
            return self
        known = {name.casefold(): number for name, number in label_ids.items()}
        missing = [name for name in self.class_names if name.casefold() not in known]
        if len(missing) == len(self.class_names):
            return self
        if missing:
            raise CorpusError(
                f"{self.source}: classes {', '.join(missing[:4])} are unknown to {source}; "
                f"it has {', '.join(list(label_ids)[:6])}"
            )
        numbers = [known[name.casefold()] for name in self.class_names]
        names = sorted(label_ids, key=lambda name: label_ids[name])
        return replace(self, labels=tuple(numbers[label] for label in self.labels), class_names=tuple(names))


def make_records(
    inputs: Sequence[Any], labels: Sequence[Any], source: str, names: Sequence[str] | None = None
) -> Records:
    """Records with labels numbered: integers stay what they are, other values are numbered in sorted order.

    Raises:
        CorpusError: no sample, a missing or fractional label, or a label outside `names`.
    """
    if not labels:
        raise CorpusError(f"{source}: no sample; check the path and the split")
    if any(label is None or isinstance(label, float) for label in labels):
        raise CorpusError(f"{source}: a label is missing or a fraction; classification needs class names or integers")
    if all(isinstance(label, int) for label in labels):
        low, high = min(labels), max(labels)
        count = len(names) if names is not None else high + 1
        if low < 0 or high >= count:
            raise CorpusError(f"{source}: labels {low}..{high} for {count} classes; leave unlabelled samples out")
        return Records(inputs, tuple(labels), tuple(names or (str(n) for n in range(count))), source)
    words = [str(label) for label in labels]
    ordered = sorted(set(words))
    numbers = {name: number for number, name in enumerate(ordered)}
    return Records(inputs, tuple(numbers[word] for word in words), tuple(ordered), source)
