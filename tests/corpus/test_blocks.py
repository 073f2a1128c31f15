# SPDX-License-Identifier: Apache-2.0
"""Equal sources, options and seed give equal blocks, every block is of one document, and nothing is lost silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.corpus import TokenBlocks, build_blocks, tokenizer_sha256
from calib.errors import CorpusError, UsageError


@pytest.fixture
def numbers(tmp_path: Path) -> list[str]:
    """Two domains: `tens` has ten documents of 100 words, all equal to the document's number; `one` has one of 40."""
    tens = tmp_path / "tens.jsonl"
    tens.write_text("".join(json.dumps({"text": f"{i} " * 100}) + "\n" for i in range(10)))
    one = tmp_path / "one.txt"
    one.write_text(" ".join(map(str, range(500, 540))))
    return [str(tens), f"single={one}"]


def test_every_block_belongs_to_its_document_and_domain(numbers: list[str], words: Any) -> None:
    blocks = build_blocks(numbers, words, samples=20, max_length=16)
    assert blocks.input_ids.shape == (20, 16)
    assert blocks.input_ids.dtype == blocks.lengths.dtype == blocks.document.dtype == blocks.domain.dtype == np.int64
    assert set(blocks.lengths.tolist()) == {16}
    assert blocks.domains == ("tens", "single")
    for ids, document, domain in zip(blocks.input_ids, blocks.document, blocks.domain, strict=True):
        if blocks.domains[domain] == "tens":
            assert set(ids.tolist()) == {document}
        else:
            assert document == 10
            assert ids.tolist() in ([*range(500, 516)], [*range(516, 532)])
    assert blocks.provenance.blocks_per_domain == {"tens": 18, "single": 2}
    assert set(blocks.document.tolist()) == set(range(11))


def test_provenance_tells_sources_options_and_hashes(numbers: list[str], words: Any) -> None:
    provenance = build_blocks(numbers, words, samples=8, max_length=16, seed=3, add_bos=True).provenance
    assert [(s.name, s.domain, s.documents) for s in provenance.sources] == [
        ("tens.jsonl", "tens", 10),
        ("one.txt", "single", 1),
    ]
    assert (provenance.layout, provenance.blocks, provenance.max_length, provenance.tokens) == ("blocks", 8, 16, 128)
    assert (provenance.seed, provenance.add_bos, provenance.chat_template_sha256) == (3, True, None)
    assert provenance.tokenizer_sha256 == tokenizer_sha256(words)
    assert provenance.documents == 7
    assert provenance.domains == ["tens", "single"]


def test_equal_calls_are_equal_and_seeds_differ(numbers: list[str], words: Any) -> None:
    def content(seed: int) -> tuple[str, list[list[int]], list[int]]:
        blocks = build_blocks(numbers, words, samples=6, max_length=8, seed=seed)
        return blocks.provenance.content_sha256, blocks.input_ids.tolist(), blocks.document.tolist()

    assert content(0) == content(0)
    assert content(0) != content(1)


def test_the_content_hash_sees_documents_domains_and_order(numbers: list[str], words: Any) -> None:
    def digest(*specs: str) -> str:
        return build_blocks(specs, words, samples=6, max_length=8).provenance.content_sha256

    tens, one = numbers[0], numbers[1].partition("=")[2]
    digests = [
        digest(tens, one),
        digest(one, tens),
        digest(f"x={tens}", one),
        digest(tens),
        digest(tens, f"tens={one}"),
    ]
    assert len(set(digests)) == len(digests)


def test_one_more_domain_does_not_change_what_the_others_are_drawn_from(numbers: list[str], words: Any) -> None:
    alone = build_blocks(numbers[:1], words, samples=4, max_length=16)
    both = build_blocks(numbers, words, samples=6, max_length=16)
    assert both.document[both.domain == 0].tolist() == alone.document.tolist()


def test_an_interrupted_run_has_seen_all_domains(numbers: list[str], words: Any) -> None:
    blocks = build_blocks(numbers, words, samples=4, max_length=16)
    assert blocks.domain.tolist() == [0, 1, 0, 1]


def test_the_bos_begins_every_block_and_belongs_to_its_length(numbers: list[str], words: Any) -> None:
    blocks = build_blocks(numbers[1:], words, samples=9, max_length=11, add_bos=True)
    rows = sorted(blocks.input_ids.tolist(), key=lambda row: row[1])
    assert rows == [[1000, *range(start, start + 10)] for start in (500, 510, 520, 530)]
    assert blocks.dropped_tokens == 0


def test_dropped_documents_and_tokens_are_counted_and_told(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": "1 " * n}) + "\n" for n in (3, 20, 5, 17)))
    blocks = build_blocks(path, words, samples=10, max_length=8)
    assert len(blocks) == 4
    assert (blocks.dropped_documents, blocks.dropped_tokens) == (2, 3 + 4 + 5 + 1)
    assert blocks.notes == (
        "mixed: 2 document(s) shorter than one block of 8 tokens left out; a lower --max-length keeps more of them",
        "corpus: 4 of the 10 blocks asked for; there is no more text",
    )


def test_a_domain_without_blocks_is_told(tmp_path: Path, numbers: list[str], words: Any) -> None:
    (tmp_path / "short.txt").write_text("1 2 3")
    blocks = build_blocks([*numbers, str(tmp_path / "short.txt")], words, samples=9, max_length=8)
    assert blocks.provenance.blocks_per_domain == {"tens": 5, "single": 4, "short": 0}
    assert "short: no block was chosen; the domain is not measured" in blocks.notes


def test_layout_documents_keeps_one_padded_document_per_row(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": "9 " * n}) + "\n" for n in (3, 20, 5)))
    blocks = build_blocks(path, words, samples=10, max_length=8, layout="documents", add_bos=True)
    assert blocks.provenance.layout == "documents"
    by_document = dict(zip(blocks.document.tolist(), blocks.input_ids.tolist(), strict=True))
    assert by_document == {
        0: [1000, 9, 9, 9, 0, 0, 0, 0],
        1: [1000, 9, 9, 9, 9, 9, 9, 9],
        2: [1000, 9, 9, 9, 9, 9, 0, 0],
    }
    assert sorted(blocks.lengths.tolist()) == [4, 6, 8]
    assert blocks.provenance.tokens == 18
    assert (blocks.dropped_documents, blocks.dropped_tokens) == (0, 13)


def test_token_ids_pass_straight_and_need_no_tokenizer(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"input_ids": [5, 4, 3, 2, 1]}) + "\n")
    for tokenizer in (None, words):
        assert build_blocks(path, tokenizer, max_length=5).input_ids.tolist() == [[5, 4, 3, 2, 1]]
    assert build_blocks(path, None, max_length=5).provenance.tokenizer_sha256 is None


def test_a_very_long_text_is_parted_at_line_ends_under_one_document_number(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{i % 1000}\n" for i in range(600_000)))  # 2.3 million characters: three parts
    blocks = build_blocks(path, words, samples=50, max_length=100)
    assert set(blocks.document.tolist()) == {0}
    assert 100_000 < blocks.input_ids.size + blocks.dropped_tokens < 600_000 or len(blocks) == 50
    for row in blocks.input_ids:
        np.testing.assert_array_equal(row, (row[0] + np.arange(100)) % 1000)


def test_a_long_line_is_parted_between_words(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(str(i % 1000) for i in range(400_000)))
    blocks = build_blocks(path, words, samples=40_000, max_length=10)
    for row in blocks.input_ids:
        np.testing.assert_array_equal(row, (row[0] + np.arange(10)) % 1000)
    assert len(blocks) >= 39_990


def test_a_corpus_shorter_than_one_block_says_how_long_it_is_and_what_helps(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "1 2 3"}\n{"text": "4 5 6 7"}\n')
    message = (
        r"corpus: no document fills one block of 512 tokens \(2 documents, 7 tokens, 4 in the longest\); "
        r"pass --max-length 4 or less, or give longer documents"
    )
    with pytest.raises(CorpusError, match=message):
        build_blocks(path, words)
    with pytest.raises(CorpusError, match="--max-length 5 or less"):
        build_blocks(path, words, add_bos=True)
    assert len(build_blocks(path, words, add_bos=True, max_length=5)) == 1


def test_a_chat_template_without_conversations_is_refused(numbers: list[str], words: Any) -> None:
    with pytest.raises(CorpusError, match="--chat-template: no document has `messages`"):
        build_blocks(numbers, words, chat_template=True)


def test_conversations_are_written_with_the_template(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "1 2"}]}) + "\n")
    blocks = build_blocks(path, words, max_length=4, chat_template=True)
    assert blocks.input_ids.tolist() == [[1000, 1002, 1, 2]]
    assert blocks.provenance.chat_template_sha256


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"samples": 0}, "--samples 0: not positive"),
        ({"max_length": 1}, "--max-length 1: too short"),
        ({"seed": -1}, "--seed -1: negative"),
        ({"layout": "rows"}, "layout 'rows': unknown; choose 'blocks' or 'documents'"),
    ],
)
def test_an_option_out_of_range_is_a_usage_error(option: dict[str, Any], message: str, words: Any) -> None:
    with pytest.raises(UsageError, match=message):
        build_blocks(None, words, **option)


def test_batches_cover_all_rows_in_order(numbers: list[str], words: Any) -> None:
    blocks: TokenBlocks = build_blocks(numbers, words, samples=7, max_length=8)
    assert [batch.tolist() for batch in blocks.batches(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(UsageError, match="batch size 0"):
        blocks.batches(0)
