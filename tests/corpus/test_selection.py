# SPDX-License-Identifier: Apache-2.0
"""Blocks are slices of their documents, shares are equal as far as they can be, orders follow the seed alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.corpus import Document
from calib.corpus.selection import Block, DomainPool, cut, interleave, share_out

BOS = 7


def pool(name: str, sizes: list[int], length: int = 4, seed: int = 0) -> DomainPool:
    """Documents with `sizes` tokens; token t of document d is 1000 * d + t."""
    documents = [(number, Document(text=f"{number} {size}")) for number, size in enumerate(sizes)]

    def blocks_of(document: Document) -> tuple[list[NDArray[np.int64]], int, int]:
        number, size = map(int, (document.text or "").split())
        blocks, unused = cut(np.arange(size) + 1000 * number, length)
        return blocks, size, unused

    return DomainPool(name, documents, blocks_of, seed)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(2, 12), st.booleans())
def test_blocks_are_consecutive_slices_of_the_document(values: list[int], length: int, bos: bool) -> None:
    ids = np.array(values, dtype=np.int64)
    blocks, unused = cut(ids, length, bos_id=BOS if bos else None)
    assert all(block.shape == (length,) and block.dtype == np.int64 for block in blocks)
    assert 0 <= unused < length
    start = 0
    for block in blocks:
        added = bos and ids[start] != BOS
        content = block[1:] if added else block
        assert not bos or block[0] == BOS
        np.testing.assert_array_equal(content, ids[start : start + content.size])
        start += content.size
    assert start + unused == ids.size


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(2, 12), st.booleans())
def test_a_whole_document_is_one_truncated_block(values: list[int], length: int, bos: bool) -> None:
    ids = np.array(values, dtype=np.int64)
    blocks, unused = cut(ids, length, bos_id=BOS if bos else None, whole=True)
    if not values:
        assert (blocks, unused) == ([], 0)
        return
    (block,) = blocks
    content = block[1:] if bos and ids[0] != BOS else block
    assert block.size <= length
    np.testing.assert_array_equal(content, ids[: content.size])
    assert content.size + unused == ids.size


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 99))
def test_no_block_crosses_documents_and_none_is_taken_twice(sizes: list[int], wanted: int, seed: int) -> None:
    chosen = pool("a", sizes, seed=seed)
    chosen.grow(wanted)
    blocks = chosen.take(wanted)
    possible = sum(size // 4 for size in sizes)
    assert len(blocks) == min(wanted, possible)
    for block in blocks:
        assert set(block.ids // 1000) == {block.document}
    assert len({int(block.ids[0]) for block in blocks}) == len(blocks)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 50))
def test_shares_are_equal_except_where_a_domain_has_no_more(domains: list[list[int]], samples: int) -> None:
    pools = [pool(str(i), sizes) for i, sizes in enumerate(domains)]
    capacity = [sum(size // 4 for size in sizes) for sizes in domains]
    shares = share_out(pools, samples)
    assert sum(shares) == min(samples, sum(capacity))
    assert all(share <= most for share, most in zip(shares, capacity, strict=True))
    able = [share for share, most in zip(shares, capacity, strict=True) if share < most]
    # Rounding may favour a domain by one block in each round of redistribution.
    assert not able or max(shares) - min(able) <= len(domains)


@given(st.lists(st.integers(0, 9), max_size=5))
def test_any_prefix_holds_the_domains_in_proportion(counts: list[int]) -> None:
    block = Block(0, np.zeros(1, dtype=np.int64))
    order = [domain for domain, _ in interleave([[block] * count for count in counts])]
    assert sorted(order) == [domain for domain, count in enumerate(counts) for _ in range(count)]
    for stop in range(len(order) + 1):
        for domain, count in enumerate(counts):
            expected = count * stop / max(1, len(order))
            assert abs(order[:stop].count(domain) - expected) <= len(counts) / 2 + 1


def test_blocks_are_spread_over_documents() -> None:
    spread = pool("a", [400] * 20)
    spread.grow(20)
    assert len({block.document for block in spread.take(20)}) >= 2
    small = pool("a", [12] * 50)
    small.grow(20)
    assert len({block.document for block in small.take(20)}) == 20


def test_documents_are_tokenized_only_as_far_as_needed() -> None:
    lazy = pool("a", [40] * 1000)
    lazy.grow(16)
    assert 160 <= lazy.tokens <= 40 * 20
    assert lazy.available >= 16


def test_orders_depend_on_seed_and_name_alone() -> None:
    def starts(name: str, seed: int) -> list[int]:
        drawn = pool(name, [40] * 30, seed=seed)
        drawn.grow(20)
        return [int(block.ids[0]) for block in drawn.take(20)]

    assert starts("a", 1) == starts("a", 1)
    assert starts("a", 1) != starts("a", 2)
    assert starts("a", 1) != starts("b", 1)
    # Frozen: numpy guarantees the raw stream, so these may never change.
    assert starts("a", 0)[:5] == FROZEN


FROZEN = [3000, 4004, 6012, 8008, 26024]
