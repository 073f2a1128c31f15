# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a large corpus are run: equal shares per domain, spread over documents, by seed.

All orders come from raw 64-bit words of PCG64, whose stream numpy guarantees, and not from `Generator` methods,
whose streams may change between versions: the same seed selects the same blocks with every numpy. The words of a
domain depend on the seed and the domain's name alone, so one more domain does not reshuffle the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "DomainPool", "cut", "interleave", "share_out"]

Item = TypeVar("Item")

_OVERSAMPLING = 32
"""Blocks tokenized per block wanted, at most, in order to choose from more documents than would just suffice."""


class Block(NamedTuple):
    """One row of the result before padding: its document and its ids, int64 `[tokens]`."""

    document: int
    ids: NDArray[np.int64]


def cut(
    ids: NDArray[np.int64], length: int, *, bos_id: int | None = None, whole: bool = False
) -> tuple[list[NDArray[np.int64]], int]:
    """Cut the ids of one document into consecutive blocks.

    Args:
        ids: int64 `[tokens]`.
        length: Tokens of a block, BOS included.
        bos_id: Token put before each block, unless the block already begins with it.
        whole: One block per document, truncated to `length`, instead of all full ones.

    Returns:
        The blocks, int64 `[length]` each (`[<= length]` if `whole`), and the number of tokens at the end that are in
        none of them: a shorter last piece is dropped, never padded.
    """
    blocks: list[NDArray[np.int64]] = []
    start = 0
    while start < ids.size:
        # A block takes one token less of the document if it has to make room for the BOS.
        stop = start + length - int(bos_id is not None and ids[start] != bos_id)
        if stop > ids.size and not whole:
            break
        blocks.append(_with_bos(ids[start:stop], bos_id))
        start = min(stop, ids.size)
        if whole:
            break
    return blocks, ids.size - start


class DomainPool(Generic[Item]):
    """The documents of one domain in seeded order, tokenized only as far as blocks are wanted.

    Args:
        name: Name of the domain, part of the seed.
        documents: Numbered documents; a number may occur more than once, for parts of a long document.
        blocks_of: Tokenizes one document and returns its blocks, its tokens and those of them in no block.
        seed: Seed of all choices, >= 0.

    Attributes:
        available: Number of blocks found so far.
        unused_tokens: Tokens seen so far that lie in no block.
        tokens: All tokens seen so far.
        longest: Tokens of the longest document seen so far.
    """

    def __init__(
        self,
        name: str,
        documents: list[tuple[int, Item]],
        blocks_of: Callable[[Item], tuple[list[NDArray[np.int64]], int, int]],
        seed: int,
    ) -> None:
        self.name = name
        self._seed = (seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        self._waiting = [documents[i] for i in _shuffled(len(documents), *self._seed)][::-1]
        self._blocks_of = blocks_of
        self._ready: list[list[Block]] = []
        self._seen: set[int] = set()
        self.available = self.unused_tokens = self.tokens = self.longest = 0

    @property
    def short_documents(self) -> int:
        """Number of documents without any block among those tokenized so far."""
        return len(self._seen - {blocks[0].document for blocks in self._ready})

    def grow(self, wanted: int) -> None:
        """Tokenize until `wanted` blocks can be chosen from as many documents, or from 32 times as many blocks."""
        while self._waiting:
            enough = self.available >= wanted
            if enough and (len(self._ready) >= wanted or self.available >= _OVERSAMPLING * wanted):
                return
            number, document = self._waiting.pop()
            pieces, tokens, unused = self._blocks_of(document)
            self._seen.add(number)
            self.tokens += tokens
            self.unused_tokens += unused
            self.longest = max(self.longest, tokens)
            if pieces:
                order = _shuffled(len(pieces), *self._seed, number, len(self._ready))
                self._ready.append([Block(number, pieces[i]) for i in order])
                self.available += len(pieces)

    def take(self, count: int) -> list[Block]:
        """Choose `count` (<= `available`) blocks: one of every document, then a second one, and so on."""
        rounds = max(map(len, self._ready), default=0)
        chosen = (blocks[i] for i in range(rounds) for blocks in self._ready if i < len(blocks))
        return [block for block, _ in zip(chosen, range(count), strict=False)]


def share_out(pools: list[DomainPool[Item]], samples: int) -> list[int]:
    """Give every domain an equal share of `samples`; what one cannot fill goes to the others, evenly.

    Returns:
        Number of blocks per pool, each <= its `available`; their sum is `samples` unless the corpus is too small.
    """
    shares = [0] * len(pools)
    able = list(range(len(pools)))
    left = samples
    while left and able:
        each, extra = divmod(left, len(able))
        for rank, i in enumerate(able):
            shares[i] += each + (rank < extra)
        for i in able:
            pools[i].grow(shares[i])
        left = sum(max(0, shares[i] - pools[i].available) for i in able)
        short = {i for i in able if pools[i].available < shares[i]}
        for i in short:
            shares[i] = pools[i].available
        able = [i for i in able if i not in short]
    return shares


def interleave(chosen: list[list[Block]]) -> list[tuple[int, Block]]:
    """Order blocks so that any prefix holds the domains in proportion; each comes with the index of its domain."""
    # Block j of n lies at (j + 1/2) / n of its domain's way; fractions, so that ties are exact.
    places = [
        (Fraction(2 * j + 1, 2 * len(blocks)), domain, j)
        for domain, blocks in enumerate(chosen)
        for j in range(len(blocks))
    ]
    return [(domain, chosen[domain][j]) for _, domain, j in sorted(places)]


def _with_bos(ids: NDArray[np.int64], bos_id: int | None) -> NDArray[np.int64]:
    if bos_id is None or (ids.size and ids[0] == bos_id):
        return ids
    return np.concatenate([np.array([bos_id], dtype=np.int64), ids])


def _shuffled(count: int, *seed: int) -> list[int]:
    words = np.random.PCG64(list(seed)).random_raw(count)
    return [int(i) for i in np.argsort(words, kind="stable")]
