# SPDX-License-Identifier: Apache-2.0
"""Hub datasets, streamed: the first documents of `owner/name[@config][:split]`, without downloading the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from calib.corpus.documents import Document
from calib.corpus.readers import document_from_record
from calib.errors import CorpusError

__all__ = ["DEFAULT_CHARACTERS", "read_hub"]

DEFAULT_CHARACTERS = 16_000_000
"""Text read where the caller names no limit: about 4 million tokens of English, 60 times a default measurement."""


def read_hub(
    name: str, domain: str | None, fallback: str, max_characters: int | None, label: str | None = None
) -> Iterator[Document]:
    """Stream documents of a hub dataset until `max_characters` of content have been seen.

    Args:
        name: `owner/name`, optionally followed by `@config` and `:split` (default split: train).
        domain: Domain of all documents, or None to take the record's own.
        fallback: Domain of a record that names none.
        max_characters: Amount of text (a token id counts as four characters, a message as its content).
        label: How errors call the dataset; default `hub:<name>`.

    Raises:
        CorpusError: The optional package is missing, the hub cannot be reached, or the dataset has no usable field.
    """
    label = label or f"hub:{name}"
    identifier, _, split = name.partition(":")
    repository, _, config = identifier.partition("@")
    left = DEFAULT_CHARACTERS if max_characters is None else max_characters
    for row, record in enumerate(_stream(label, repository, config or None, split or "train")):
        document = document_from_record(record, f"{label}: row {row}", domain, fallback)
        if document is not None:
            yield document
            left -= _characters(document)
        if left <= 0:
            return


def _stream(label: str, repository: str, config: str | None, split: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"{label}: hub datasets need an optional package; pip install calib[datasets]") from error
    try:
        yield from datasets.load_dataset(repository, config, split=split, streaming=True)
    except Exception as error:  # the loader raises anything: network, parsing, script and configuration errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"{label}: cannot be streamed ({reason}); check the name and the network, or use a file"
        ) from error


def _characters(document: Document) -> int:
    conversation = sum(len(str(message.get("content", ""))) for message in document.messages or ())
    return len(document.text or "") + conversation + 4 * len(document.token_ids or ())
