# SPDX-License-Identifier: Apache-2.0
"""Readers of local files: plain text, JSON lines and parquet, chosen by suffix, and folders of them.

A text file is one document. A JSON line or parquet row is one document with the fields `text`, `messages` or
`input_ids`, and optionally `domain`. Every fault names the file and the line, row or byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.corpus.documents import Document
from calib.errors import CorpusError

__all__ = ["FIELDS", "SUFFIXES", "document_from_record", "json_records", "parquet_records", "read_path"]

FIELDS = ("text", "messages", "input_ids")
"""Fields of a record that hold content; each is optional, one must be there."""

Reader = Callable[[Path, str | None, str], Iterator[Document]]
SUFFIXES: dict[str, Reader] = {}
"""Suffix -> reader(path, domain of all documents or None, domain where a record names none)."""

_TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".sql"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java", ".js", ".jsx", ".ts", ".tsx"),
    *(".kt", ".rb", ".rs", ".scala", ".sh", ".swift", ".php", ".pl", ".r", ".jl", ".lua", ".hs", ".f90"),
)


def read_path(path: Path, domain: str | None, fallback: str) -> Iterator[Document]:
    """Read a file by its suffix, or every known file of a folder, recursively and sorted by path.

    Raises:
        CorpusError: An unsupported suffix, or a folder without any supported file.
    """
    if not path.is_dir():
        reader = SUFFIXES.get(path.suffix.lower())
        if reader is None:
            known = "plain text (.txt, .md, .py ...), .jsonl, .parquet or a folder"
            raise CorpusError(f"{path}: unsupported suffix '{path.suffix}'; give {known}")
        yield from reader(path, domain, fallback)
        return
    files = sorted(file for file in path.rglob("*") if _is_readable(file, path))
    if not files:
        raise CorpusError(f"{path}: the folder holds no supported file; expected .txt, .jsonl, .parquet or other text")
    for file in files:
        yield from SUFFIXES[file.suffix.lower()](file, domain, fallback)


def document_from_record(record: object, where: str, domain: str | None, fallback: str) -> Document | None:
    """Turn one record of a .jsonl or .parquet file or hub dataset into a document.

    Args:
        record: Mapping with `text` (string), `messages` (list of mappings with `role`) or `input_ids` (list of
            integers); None counts as absent.
        where: File and line, for errors.
        domain: Domain of all documents, or None to take the record's `domain`, or else `fallback`.
        fallback: Domain of a record that names none.

    Returns:
        The document, or None if all its content is blank.

    Raises:
        CorpusError: None of the fields is there, or one has the wrong type.
    """
    if not isinstance(record, Mapping):
        raise CorpusError(f"{where}: not an object; expected one of the fields {', '.join(FIELDS)}")
    present = {name: record[name] for name in FIELDS if record.get(name) is not None}
    null = [name for name in FIELDS if name in record and name not in present]
    if null and not present:
        fields = ", ".join(FIELDS)
        raise CorpusError(f"{where}: none of the fields {fields} holds anything; `{null[0]}` is null, drop such rows")
    if not present:
        found = ", ".join(map(str, list(record)[:8])) or "nothing"
        raise CorpusError(f"{where}: none of the fields {', '.join(FIELDS)}; found {found}, rename the field")
    text = _checked_text(present["text"], where) if "text" in present else None
    messages = _checked_messages(present["messages"], where) if "messages" in present else None
    token_ids = _checked_token_ids(present["input_ids"], where) if "input_ids" in present else None
    if not (text or messages or token_ids):
        return None
    named = record.get("domain")
    label = domain or (named if isinstance(named, str) and named else fallback)
    return Document(text or None, messages or None, token_ids or None, label, where)


def _reads(*suffixes: str) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        SUFFIXES.update(dict.fromkeys(suffixes, reader))
        return reader

    return register


@_reads(*_TEXT_SUFFIXES)
def _read_text(path: Path, domain: str | None, fallback: str) -> Iterator[Document]:
    """One file, one document."""
    text = _decoded(path)
    if text.strip():
        yield Document(text=text, domain=domain or fallback, source=str(path))


@_reads(".jsonl", ".ndjson")
def _read_jsonl(path: Path, domain: str | None, fallback: str) -> Iterator[Document]:
    """One line, one document."""
    for where, record in json_records(path):
        document = document_from_record(record, where, domain, fallback)
        if document is not None:
            yield document


@_reads(".parquet")
def _read_parquet(path: Path, domain: str | None, fallback: str) -> Iterator[Document]:
    """One row, one document."""
    for where, record in parquet_records(path, FIELDS):
        document = document_from_record(record, where, domain, fallback)
        if document is not None:
            yield document


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Each line with its place for errors. Decoded line by line: a file may be larger than memory should hold twice."""
    offset = 0
    with _opened(path) as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            line = _decoded_bytes(raw, path, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise CorpusError(f"{where}: not JSON ({reason}); write one JSON object per line") from error
            yield where, record


def parquet_records(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Each row with its place for errors; only the columns that matter are read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CorpusError(f"{path}: parquet needs pyarrow; pip install calib[datasets]") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in (*fields, "domain") if name in names] or names[:8]
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield f"{path}: row {row}", record
                    row += 1
    except (ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a readable parquet file ({_first_line(error)}); write it again") from error


def _is_readable(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.is_file()


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _decoded(path: Path) -> str:
    with _opened(path) as stream:
        return _decoded_bytes(stream.read(), path, 0)


def _decoded_bytes(raw: bytes, path: Path, offset: int) -> str:
    """Decode UTF-8 (a byte order mark is no text), or tell the byte of the file at which it is not text."""
    zero = raw.find(b"\0")
    if zero >= 0:
        raise CorpusError(f"{path}: binary, a NUL byte at offset {offset + zero}; give UTF-8 text")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise CorpusError(f"{path}: not UTF-8 at byte offset {where}; convert it, e.g. with iconv") from error


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: `text` is a {type(value).__name__}; write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: `text` holds half of a surrogate pair; write valid Unicode") from error
    return value if value.strip() else ""


def _checked_messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        raise CorpusError(f'{where}: `messages` is malformed; write [{{"role": "user", "content": "..."}}, ...]')
    return tuple(value)


def _checked_token_ids(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise CorpusError(f"{where}: `input_ids` is malformed; write a flat list of integers >= 0")
    return tuple(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
