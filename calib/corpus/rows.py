# SPDX-License-Identifier: Apache-2.0
"""`Rows`: what a measurement needs of its data, be it blocks of tokens or examples with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from numpy import int64
from numpy.typing import NDArray

from calib.schema.provenance import CorpusProvenance

if TYPE_CHECKING:
    import torch

__all__ = ["RowInputs", "Rows"]


@dataclass(frozen=True, eq=False)
class RowInputs:
    """What a model is called with for some rows.

    Attributes:
        tensors: arguments by name, on the CPU, rows first. `attention_mask` is there only where tokens are padded,
            or where a processor makes one.
        targets: of each row the token ids that a decoder is to write, int64 `[tokens]`, or None.
    """

    tensors: dict[str, torch.Tensor]
    targets: tuple[NDArray[int64] | None, ...]


class Rows(Protocol):
    """Rows in the order in which they run.

    Attributes:
        lengths: int64 `[n]`, valid tokens of a row; 1 where a row has no tokens of its own.
        document: int64 `[n]`, number of the document in the order of reading.
        domain: int64 `[n]`, index into the domains of the provenance.
        provenance: sources, options and hashes.
        notes: what a user should know, a line each.
    """

    @property
    def lengths(self) -> NDArray[int64]: ...  # noqa: D102
    @property
    def document(self) -> NDArray[int64]: ...  # noqa: D102
    @property
    def domain(self) -> NDArray[int64]: ...  # noqa: D102
    @property
    def provenance(self) -> CorpusProvenance: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> list[NDArray[int64]]:
        """The row indices of consecutive batches."""

    def rows_per_batch(self, tokens: int) -> int:
        """How many rows make a batch of about so many tokens."""

    def inputs(self, rows: NDArray[Any], width: int | None = None) -> RowInputs:
        """What the model is called with, cut to the first `width` tokens where rows are tokens alone."""
