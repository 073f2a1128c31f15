# SPDX-License-Identifier: Apache-2.0
"""A source is named as on the command line, and its documents come in an order that depends on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.corpus import Document, parse_source, read_documents
from calib.corpus.documents import default_domain, hash_documents, source_name
from calib.errors import CorpusError, UsageError


def test_domain_and_path_are_split_at_the_first_equals_sign() -> None:
    assert parse_source("math=foo.txt") == ("math", "foo.txt")
    assert parse_source("math=a=b.txt") == ("math", "a=b.txt")
    assert parse_source("foo.txt") == (None, "foo.txt")
    assert parse_source("code=hub:owner/name:train") == ("code", "hub:owner/name:train")
    assert parse_source("data/run=3/foo.txt") == (None, "data/run=3/foo.txt")


def test_an_existing_path_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3.txt").write_text("hello")
    assert parse_source("lr=3.txt") == (None, "lr=3.txt")


@pytest.mark.parametrize("spec", ["=foo.txt", "math=", "a b=foo.txt"])
def test_a_malformed_domain_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match="domain=path"):
        parse_source(spec)


def test_a_file_is_one_document_whose_domain_is_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes("\ufeffOne.\r\n\r\nZwei § três.\n".encode())
    (document,) = read_documents(path)
    assert document == Document(text="One.\r\n\r\nZwei § três.\n", domain="novel", source=str(path))
    assert next(read_documents(path, "prose")).domain == "prose"


def test_a_folder_is_read_recursively_in_path_order_without_hidden_or_unknown_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.py", "c.jsonl", ".hidden/x.txt", ".d.txt", "image.png", "blank.txt"):
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "c.jsonl"}\n' if name == "c.jsonl" else "" if name == "blank.txt" else name)
    documents = list(read_documents(tmp_path / "mixed"))
    assert [document.text for document in documents] == ["a/b.py", "a/z.md", "b.txt", "c.jsonl"]
    assert {document.domain for document in documents} == {"mixed"}


def test_names_in_provenance_hold_no_folders_of_this_machine(tmp_path: Path) -> None:
    assert source_name(tmp_path / "a.txt") == "a.txt"
    assert source_name("builtin:prose") == source_name("builtin") == "builtin"
    assert source_name("hub:owner/name:test") == "owner/name:test"
    assert default_domain("hub:owner/name@config:test") == "name"
    assert default_domain(tmp_path / "c.d.jsonl") == "c.d"


def test_the_hash_sees_content_and_order_but_not_the_place() -> None:
    one, two = Document(text="one", source="x"), Document(text="two")
    assert hash_documents([one, two]) == hash_documents([Document(text="one", source="y"), two])
    assert hash_documents([one, two]) != hash_documents([two, one])
    assert hash_documents([one]) != hash_documents([Document(token_ids=(1,))])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.txt: no such file or folder; check the path"):
        read_documents(tmp_path / "nowhere.txt")


def test_an_unsupported_suffix_is_named(tmp_path: Path) -> None:
    path = tmp_path / "book.docx"
    path.write_text("text")
    with pytest.raises(CorpusError, match=r"book\.docx: unsupported suffix '\.docx'; give plain text"):
        list(read_documents(path))


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="the folder holds no supported file"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("e.txt", ""), ("e.txt", " \n\t\n"), ("e.jsonl", '\n{"text": ""}\n')])
def test_a_source_without_documents_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CorpusError, match="holds no documents"):
        list(read_documents(path))
