# SPDX-License-Identifier: Apache-2.0
"""The built-in corpus is what its list of sources says, small enough to ship and large enough to measure."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from importlib import resources
from typing import Any

import pytest

from calib.corpus import build_blocks, builtin_documents, builtin_domains, builtin_sources, read_documents
from calib.corpus.builtin import builtin_licence
from calib.errors import CorpusError

DOMAINS = ("prose", "speeches", "dialogue", "code", "mathematics", "technical", "multilingual")


def test_it_holds_the_domains_that_it_lists() -> None:
    assert builtin_domains() == DOMAINS
    documents = list(builtin_documents())
    assert tuple(dict.fromkeys(document.domain for document in documents)) == DOMAINS
    listed = dict.fromkeys(DOMAINS, 0)
    for source in builtin_sources():
        listed[source["domain"]] += source["documents"]
    assert {domain: sum(d.domain == domain for d in documents) for domain in DOMAINS} == listed


def test_its_text_has_the_recorded_hash_and_size() -> None:
    folder = resources.files("calib.corpus")
    packed = folder.joinpath("builtin.jsonl.xz").read_bytes()
    assert len(packed) < 2_000_000
    lines = lzma.decompress(packed).decode().removesuffix("\n").split("\n")
    described = json.loads(folder.joinpath("builtin_sources.json").read_text(encoding="utf-8"))
    assert hashlib.sha256(("\n".join(lines) + "\n").encode()).hexdigest() == described["sha256"]
    start = 0
    for source in described["sources"]:
        part = lines[start : start + source["documents"]]
        assert hashlib.sha256("\n".join(part).encode()).hexdigest() == source["sha256"]
        start += source["documents"]
    assert start == len(lines)


def test_every_licence_is_permissive_and_its_text_is_included() -> None:
    described = json.loads(resources.files("calib.corpus").joinpath("builtin_sources.json").read_text(encoding="utf-8"))
    needed = {source["package"] for source in described["sources"] if not source["licence"].startswith("public domain")}
    # The standard library comes without its licence in the package that it is taken from.
    assert {name.replace("pyodide 0.29.4 (npm)", "typing_extensions 4.16.0 (PyPI)") for name in needed} <= set(
        described["notices"]
    )
    assert {source["licence"].split(" (")[0] for source in described["sources"]} == {
        *("public domain", "BSD-3-Clause", "MIT", "PSF-2.0")
    }
    assert builtin_licence("code") == "PSF-2.0 AND MIT"


def test_it_speaks_at_least_five_languages_besides_english() -> None:
    documents = list(builtin_documents("multilingual"))
    names = {name for d in documents for name in re.findall(r"\((?:udhr/)?(\w+)", d.source)}
    assert {"Arabic", "Chinese", "French", "Russian", "Spanish", "bengali", "german", "hindi", "japanese"} <= names
    text = "".join(document.text or "" for document in documents)
    for script in (r"[\u0400-\u04ff]", r"[\u0600-\u06ff]", r"[\u0900-\u097f]", r"[\u0980-\u09ff]", r"[\u3040-\u30ff]"):
        assert len(re.findall(script, text)) > 500
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 2000


def test_moby_dick_ends_before_the_text_that_benchmarks_evaluate_on() -> None:
    text = "".join(document.text or "" for document in builtin_documents("prose"))
    assert "CHAPTER 7. The Chapel." in text
    assert "The Pulpit" not in text


def test_conversations_alternate_and_can_take_a_chat_template(words: Any) -> None:
    documents = [d for d in builtin_documents("dialogue") if d.messages]
    assert documents
    for document in documents:
        assert document.messages is not None
        assert [m["role"] for m in document.messages[:4]] == ["user", "assistant"] * 2
        assert len(document.messages) % 2 == 0
        assert all(m["content"] for m in document.messages)
    assert build_blocks(["builtin:dialogue"], words, samples=2, chat_template=True).provenance.chat_template_sha256


def test_a_domain_can_be_chosen_and_renamed() -> None:
    assert {document.domain for document in read_documents("builtin:code")} == {"code"}
    assert {document.domain for document in read_documents("builtin:code", "python")} == {"python"}
    with pytest.raises(CorpusError, match="builtin:poetry: no such domain; choose one of prose, speeches"):
        read_documents("builtin:poetry")


def test_the_default_measurement_takes_equal_shares_of_all_domains(bpe: Any) -> None:
    blocks = build_blocks(None, bpe)
    assert blocks.input_ids.shape == (128, 512)
    assert blocks.domains == DOMAINS
    assert set(blocks.provenance.blocks_per_domain.values()) == {18, 19}
    assert len(set(blocks.document.tolist())) >= 60
    assert [source.domain for source in blocks.provenance.sources] == list(DOMAINS)
    assert {source.name for source in blocks.provenance.sources} == {"builtin"}
    assert blocks.provenance.sources[1].licence == "public domain"


def test_long_contexts_fit_into_prose_speeches_code_and_technical_text(bpe: Any) -> None:
    for domain in ("prose", "speeches", "code", "technical"):
        assert len(build_blocks([f"builtin:{domain}"], bpe, samples=4, max_length=4096)) == 4
