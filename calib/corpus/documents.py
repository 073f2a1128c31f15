# SPDX-License-Identifier: Apache-2.0
"""Documents, the unit of calibration data, and the one function that reads them from wherever they are.

A source is named as on the command line: a file, a folder, `hub:owner/name`, `builtin` or `builtin:domain`, each
optionally behind `domain=`. Documents are numbered in the order in which they are read; that number is what
peaks and per-document maxima refer to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.errors import CorpusError, UsageError

__all__ = ["Document", "default_domain", "hash_documents", "parse_source", "read_documents", "source_name"]

_DOMAIN = re.compile(r"[\w.+-]+")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, conversation or token sequence; several forms of the same content may be present.

    The form that is used: `token_ids` if given, else `messages` if the chat template is asked for, else `text`.

    Attributes:
        text: Plain text, never empty.
        messages: A conversation as chat templates take it: mappings with at least `role`.
        token_ids: Ids of the very tokenizer (or model) that will be measured, all >= 0.
        domain: Stratum of the selection and unit of per-domain peaks.
        source: Where it was read, for errors: file name, and line or row where there is one.
    """

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    domain: str = "text"
    source: str = "document"


def parse_source(spec: str) -> tuple[str | None, str]:
    """Split `domain=path` into its parts; an existing path that contains '=' is a path.

    Returns:
        The domain, or None where none was given, and the path, hub id or `builtin[:domain]`.

    Raises:
        UsageError: An empty domain or an empty path.
    """
    left, equals, right = spec.partition("=")
    if not equals or "/" in left or "\\" in left or Path(spec).exists():
        return None, spec
    if not _DOMAIN.fullmatch(left) or not right:
        raise UsageError(f"{spec}: not of the form domain=path; name the domain with letters, digits, '-', '_', '.'")
    return left, right


def default_domain(spec: str | Path) -> str:
    """Domain of a source for which none is given: the stem of a file, the name of a folder or hub dataset."""
    path = Path(_hub_id(str(spec)).partition(":")[0].partition("@")[0])
    return (path.stem if path.suffix and not path.is_dir() else path.resolve().name) or "text"


def source_name(spec: str | Path) -> str:
    """Name of a source as provenance records it: without the folders that lead to it, which identify a machine."""
    text = str(spec)
    if text == "builtin" or text.startswith("builtin:"):
        return "builtin"
    if _is_hub(text):
        return _hub_id(text)
    return Path(text).resolve().name


def read_documents(
    spec: str | Path, domain: str | None = None, *, max_characters: int | None = None
) -> Iterator[Document]:
    """Read the documents of one source, in an order that depends on nothing but the source.

    Args:
        spec: A file (see `SUFFIXES` of `calib.corpus.readers`), a folder (all such files in it, sorted by path),
            `hub:owner/name[@config][:split]`, `builtin` or `builtin:domain`. A path that does not exist and looks
            like a hub id is taken for one.
        domain: Domain of all documents. Default: the `domain` field of a record, else `default_domain(spec)`.
        max_characters: Stop a hub dataset, which has no end that one would want to reach, after about so much text.

    Yields:
        Documents; blank ones are left out.

    Raises:
        CorpusError: The source is missing, unreadable, of an unsupported form, or holds no document.
    """
    from calib.corpus import builtin, hub, readers

    text = str(spec)
    if text == "builtin" or text.startswith("builtin:"):
        documents = builtin.builtin_documents(text.partition(":")[2] or None)
        return (replace(document, domain=domain) for document in documents) if domain else documents
    fallback = default_domain(spec)
    if _is_hub(text):
        label = text if text.startswith("hub:") else f"{text} (no such path, so taken for a hub dataset)"
        return _not_empty(hub.read_hub(_hub_id(text), domain, fallback, max_characters, label), text)
    path = Path(spec)
    if not path.exists():
        raise CorpusError(f"{spec}: no such file or folder; check the path, or write hub:owner/name for a hub dataset")
    return _not_empty(readers.read_path(path, domain, fallback), text)


def hash_documents(documents: list[Document]) -> str:
    """Return the sha256 over the content of documents in order; where they were read does not enter."""
    digest = hashlib.sha256()
    for document in documents:
        content = [document.text, document.messages, document.token_ids]
        line = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _is_hub(text: str) -> bool:
    if text.startswith("hub:"):
        return True
    return bool(_HUB_ID.fullmatch(text)) and not Path(text).suffix and not Path(text).exists()


def _hub_id(text: str) -> str:
    return text.removeprefix("hub:")


def _not_empty(documents: Iterator[Document], name: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise CorpusError(f"{name}: holds no documents, or only blank ones; give a source with text in it")
