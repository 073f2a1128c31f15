# SPDX-License-Identifier: Apache-2.0
"""Calibration data: text to deterministic blocks, pictures and sound to examples; the built-in corpus; hashes."""

from __future__ import annotations

from calib.corpus.blocks import TokenBlocks, build_blocks
from calib.corpus.builtin import builtin_documents, builtin_domains, builtin_sources
from calib.corpus.documents import Document, parse_source, read_documents
from calib.corpus.example_rows import ExampleRows, build_examples
from calib.corpus.examples import Example, data_kinds, read_examples
from calib.corpus.preparation import Preparation
from calib.corpus.rows import RowInputs, Rows
from calib.corpus.tokens import tokenizer_sha256

__all__ = [
    "Document",
    "Example",
    "ExampleRows",
    "Preparation",
    "RowInputs",
    "Rows",
    "TokenBlocks",
    "build_blocks",
    "build_examples",
    "builtin_documents",
    "builtin_domains",
    "builtin_sources",
    "data_kinds",
    "parse_source",
    "read_documents",
    "read_examples",
    "tokenizer_sha256",
]
