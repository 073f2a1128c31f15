# SPDX-License-Identifier: Apache-2.0
"""The built-in corpus: permissive or public-domain text of several domains, shipped as package data.

`benchmarks/build_corpus.py` makes both files; `builtin_sources.json` names package, licence and hash of every part.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from importlib import resources
from typing import Any

from calib.corpus.documents import Document
from calib.errors import CorpusError

__all__ = ["builtin_documents", "builtin_domains", "builtin_licence", "builtin_sources"]


def builtin_sources() -> list[dict[str, Any]]:
    """Return what the corpus is made of: per source its domain, package, version, licence, amount and sha256."""
    file = resources.files("calib.corpus").joinpath("builtin_sources.json")
    sources: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["sources"]
    return sources


def builtin_domains() -> tuple[str, ...]:
    """Return the domains of the built-in corpus, in order."""
    return tuple(dict.fromkeys(source["domain"] for source in builtin_sources()))


def builtin_licence(domain: str | None = None) -> str:
    """Return the licences of the built-in corpus, or of one domain, joined with 'AND' as SPDX expressions are."""
    licences = (s["licence"] for s in builtin_sources() if domain is None or s["domain"] == domain)
    return " AND ".join(dict.fromkeys(licences))


def builtin_documents(domain: str | None = None) -> Iterator[Document]:
    """Read the built-in corpus, or one domain of it.

    Conversations come as text, a line per turn, and as `messages`, so that a chat template can be applied.

    Raises:
        CorpusError: No such domain.
    """
    if domain is not None and domain not in builtin_domains():
        raise CorpusError(f"builtin:{domain}: no such domain; choose one of {', '.join(builtin_domains())}")
    return _documents(domain)


def _documents(domain: str | None) -> Iterator[Document]:
    packed = resources.files("calib.corpus").joinpath("builtin.jsonl.xz").read_bytes()
    # Split at "\n" alone: texts may hold other characters that str.splitlines takes for line ends.
    for number, line in enumerate(lzma.decompress(packed).decode("utf-8").rstrip("\n").split("\n")):
        record = json.loads(line)
        if domain is not None and record["domain"] != domain:
            continue
        where = f"builtin: document {number} ({record['source']})"
        if "conversations" in record:
            conversations = record["conversations"]
            text = "\n\n".join("\n".join(turns) for turns in conversations) + "\n"
            turns = [turn for conversation in conversations for turn in conversation]
            messages = tuple(
                {"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)
            )
            yield Document(text=text, messages=messages, domain=record["domain"], source=where)
        else:
            yield Document(text=record["text"], domain=record["domain"], source=where)
