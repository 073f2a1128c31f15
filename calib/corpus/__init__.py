# SPDX-License-Identifier: Apache-2.0
"""Calibration data: text, conversations and tokens to deterministic blocks; the built-in corpus; hashes."""

from __future__ import annotations

from calib.corpus.blocks import TokenBlocks, build_blocks
from calib.corpus.builtin import builtin_documents, builtin_domains, builtin_sources
from calib.corpus.documents import Document, parse_source, read_documents
from calib.corpus.tokens import tokenizer_sha256

__all__ = [
    "Document",
    "TokenBlocks",
    "build_blocks",
    "builtin_documents",
    "builtin_domains",
    "builtin_sources",
    "parse_source",
    "read_documents",
    "tokenizer_sha256",
]
