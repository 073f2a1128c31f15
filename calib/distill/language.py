# SPDX-License-Identifier: Apache-2.0
"""Token blocks as batches of a causal language model, and its CMI in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from calib.corpus import TokenBlocks
from calib.distill.cmi import measure_information
from calib.distill.data import Records
from calib.distill.grouping import RowGrouping, frequent_rows
from calib.distill.information import ClassInformation
from calib.distill.task import CausalLanguageTask
from calib.errors import CorpusError

__all__ = ["BlockSet", "block_loader", "block_records", "language_information", "next_token_counts"]


class BlockSet(Dataset[dict[str, Tensor]]):
    """Samples with `input_ids` and `attention_mask` int64 `[length]` and `index`."""

    def __init__(self, blocks: TokenBlocks | Records) -> None:
        if isinstance(blocks, Records):
            self.ids = torch.stack(list(blocks.inputs))
            self.mask = torch.ones_like(self.ids)
        else:
            self.ids = torch.from_numpy(blocks.input_ids)
            self.mask = (torch.arange(self.ids.shape[1]) < torch.from_numpy(blocks.lengths)[:, None]).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[number], "attention_mask": self.mask[number], "index": torch.tensor(number)}


def block_loader(blocks: TokenBlocks, *, batch_size: int = 8, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
    """Batches for `CausalLanguageTask`; shuffled by torch's global generator."""
    return DataLoader(BlockSet(blocks), batch_size=batch_size, shuffle=shuffle)


def block_records(blocks: TokenBlocks, source: str) -> Records:
    """Full blocks as records, int64 ``[length]`` each; their one class stands for text.

    Raises:
        CorpusError: a block is not full.
    """
    if (blocks.lengths != blocks.input_ids.shape[1]).any():
        raise CorpusError(f"data {source}: too little text for full blocks; give more, or a smaller max_length")
    return Records(list(torch.from_numpy(blocks.input_ids)), (0,) * len(blocks), ("text",), source)


def next_token_counts(blocks: TokenBlocks | Records, classes: int) -> Tensor:
    """How often each token follows another one in the blocks, int64 `[V]`."""
    found = BlockSet(blocks)
    return torch.bincount(found.ids[:, 1:][found.mask[:, 1:] == 1], minlength=classes)


def language_information(
    model: nn.Module,
    blocks: TokenBlocks,
    *,
    batch_size: int = 8,
    temperatures: tuple[float, ...] = (1.0,),
    grouping: RowGrouping | None = None,
    **options: Any,
) -> tuple[list[ClassInformation], RowGrouping]:
    """Information of a causal language model over token blocks, the class of a position being its next token.

    Args:
        model: a causal language model.
        blocks: what it reads.
        batch_size: blocks of a forward pass.
        temperatures: one result for each; each keeps rows of its own in memory.
        grouping: rows; made from the blocks' own token counts if absent.
        options: what `frequent_rows` takes.

    Raises:
        UsageError: the memory does not suffice.
    """
    config: Any = model.config
    grouping = grouping or frequent_rows(next_token_counts(blocks, config.vocab_size), **options)
    found = measure_information(
        model,
        block_loader(blocks, batch_size=batch_size),
        task=CausalLanguageTask(),
        temperatures=temperatures,
        separation=False,
        rows=(grouping.rows, grouping.row_of_label),
    )
    return found, grouping
