# SPDX-License-Identifier: Apache-2.0
"""Each format gives the documents it holds, and each fault is told in one line with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calib.corpus import read_documents
from calib.errors import CorpusError

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RECORDS: list[dict[str, Any]] = [
    {"text": "plain", "id": 1},
    {"messages": CONVERSATION},
    {"input_ids": [3, 1, 2]},
    {"text": "own domain", "domain": "law"},
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_json_lines_may_mix_text_messages_and_token_ids(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mixed.jsonl", RECORDS)
    text, talk, ids, law = read_documents(path)
    assert (text.text, text.domain, text.source) == ("plain", "mixed", f"{path}:1")
    assert talk.messages == tuple(CONVERSATION)
    assert talk.text is None
    assert ids.token_ids == (3, 1, 2)
    assert law.domain == "law"
    assert {document.domain for document in read_documents(path, "all")} == {"all"}


def test_parquet_gives_the_same_documents_as_json_lines(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = ("text", "messages", "input_ids", "domain", "id")
    rows = [{name: record.get(name) for name in columns} for record in RECORDS]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    write_jsonl(tmp_path / "mixed.jsonl", RECORDS)
    both = [list(read_documents(tmp_path / f"mixed.{suffix}")) for suffix in ("parquet", "jsonl")]
    contents = [[(d.text, d.messages, d.token_ids, d.domain) for d in documents] for documents in both]
    assert contents[0] == contents[1]
    assert both[0][2].source.endswith("mixed.parquet: row 2")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ab\x00c", "binary, a NUL byte at offset 2; give UTF-8 text"),
        (b"caf\xe9 au lait", "not UTF-8 at byte offset 3"),
        ("utf-16".encode("utf-16"), "NUL byte at offset"),
    ],
)
def test_a_binary_file_is_refused_with_its_first_bad_byte(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=reason):
        list(read_documents(path))


def test_the_byte_offset_counts_from_the_start_of_a_json_lines_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match="not UTF-8 at byte offset 25"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", r":2: not JSON \(Expecting property name"),
        ("[" * 100_000, r":2: not JSON"),
        ("[1, 2]", ":2: not an object"),
        ("17", ":2: not an object"),
        ('{"body": "x", "id": 3}', ":2: none of the fields text, messages, input_ids; found body, id"),
        ("{}", ":2: none of the fields .* found nothing"),
        ('{"text": null}', ":2: none of the fields .* holds anything; `text` is null, drop such rows"),
        ('{"text": 5}', ":2: `text` is a int; write a string"),
        ('{"text": "\\ud800"}', ":2: `text` holds half of a surrogate pair"),
        ('{"messages": "hi"}', ":2: `messages` is malformed"),
        ('{"messages": [{"content": "hi"}]}', ":2: `messages` is malformed"),
        ('{"input_ids": [1, -1]}', ":2: `input_ids` is malformed"),
        ('{"input_ids": [[1, 2]]}', ":2: `input_ids` is malformed"),
        ('{"input_ids": [1.5]}', ":2: `input_ids` is malformed"),
        ('{"input_ids": [true]}', ":2: `input_ids` is malformed"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=f"bad.jsonl{reason}") as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_none_or_has_no_field_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(CorpusError, match=r"bad\.parquet: not a readable parquet file"):
        list(read_documents(path))
    parquet.write_table(pa.Table.from_pylist([{"body": "x"}]), path)
    with pytest.raises(CorpusError, match=r"row 0: none of the fields .* found body"):
        list(read_documents(path))


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.txt"
    path.write_text("x")
    path.chmod(0)
    try:
        path.read_text()
    except PermissionError:
        with pytest.raises(CorpusError, match=r"loop\.txt: cannot be read"):
            list(read_documents(path))
    else:
        pytest.skip("this user may read everything")
