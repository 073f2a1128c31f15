# SPDX-License-Identifier: Apache-2.0
"""Token blocks: the exact input of a measurement, chosen from its sources by seed, with its provenance.

Layout `blocks` cuts documents into blocks of equal length, so that padding, which would count as activations, is never
needed; a block belongs to one document. Layout `documents` keeps one document per row, truncated, padded at the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calib.corpus.builtin import builtin_licence
from calib.corpus.documents import Document, hash_documents, parse_source, read_documents, source_name
from calib.corpus.rows import RowInputs
from calib.corpus.selection import DomainPool, cut, interleave, share_out
from calib.corpus.tokens import Encoder, tokenizer_sha256
from calib.errors import CorpusError, UsageError
from calib.schema.provenance import CorpusProvenance, SourceProvenance

__all__ = ["Layout", "TokenBlocks", "build_blocks"]

Layout = Literal["blocks", "documents"]

_PART = 1 << 18
"""Characters that are tokenized at once: a longer document is parted at a line end, so that a gigabyte of text
costs no more time than its blocks need. No block crosses parts."""

_HUB_CHARACTERS_PER_TOKEN = 64
"""Text streamed from the hub per token wanted: 16 times what English needs, for short documents and a choice."""


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Rows of token ids in the order in which they run, interleaved over domains.

    Attributes:
        input_ids: int64 `[n, L]`; layout `documents`: zeros behind the valid tokens.
        lengths: int64 `[n]`, valid tokens of a row; all equal to L in layout `blocks`.
        document: int64 `[n]`, number of the document in the order in which the sources were read, from 0.
        domain: int64 `[n]`, index into `domains`.
        domains: Names of the domains, in order of first appearance.
        provenance: Sources, options and hashes.
        dropped_documents: Documents (of those that had to be tokenized) that do not fill one block.
        dropped_tokens: Tokens (of the same) in no block: short documents, and ends of long ones.
        notes: What a user should know, a line each: dropped documents, fewer blocks than asked for.
    """

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    document: NDArray[np.int64]
    domain: NDArray[np.int64]
    domains: tuple[str, ...]
    provenance: CorpusProvenance
    dropped_documents: int = 0
    dropped_tokens: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def batches(self, batch_size: int) -> list[NDArray[np.int64]]:
        """Return the row indices of consecutive batches, int64 `[batch_size]` each, the last one maybe shorter."""
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size}: not positive; give 1 or more")
        rows = np.arange(len(self), dtype=np.int64)
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def rows_per_batch(self, tokens: int) -> int:
        """How many rows make a batch of about so many tokens, at least one."""
        return max(1, tokens // int(self.input_ids.shape[1]))

    def inputs(self, rows: NDArray[Any], width: int | None = None) -> RowInputs:
        """Token ids cut to the longest row, or to `width`, with a mask where rows are padded."""
        import torch

        lengths = np.minimum(self.lengths[rows], width or self.input_ids.shape[1])
        longest = int(lengths.max())
        valid = np.arange(longest) < lengths[:, None]
        tensors = {"input_ids": torch.from_numpy(self.input_ids[rows, :longest])}
        if not valid.all():
            tensors["attention_mask"] = torch.from_numpy(valid.astype(np.int64))
        return RowInputs(tensors, (None,) * len(rows))

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> TokenBlocks:
        """Some of the rows, in the order given, with provenance of their own."""
        chosen = np.asarray(rows, np.int64)
        return self._with(self.input_ids[chosen], self.lengths[chosen], self.document[chosen], self.domain[chosen])

    def with_prefix(self, token_ids: Sequence[int]) -> TokenBlocks:
        """The same rows with tokens in front of each."""
        front = np.broadcast_to(np.asarray(token_ids, np.int64), (len(self), len(token_ids)))
        ids = np.concatenate([front, self.input_ids], axis=1)
        return self._with(ids, self.lengths + len(token_ids), self.document, self.domain)

    def rewritten(self, input_ids: NDArray[np.int64], name: str) -> TokenBlocks:
        """Other tokens in the place of these, ``[n, L]`` as well: a source and a domain of their own.

        Raises:
            UsageError: the shape is another one.
        """
        if input_ids.shape != self.input_ids.shape:
            raise UsageError(f"token ids {input_ids.shape}: must be {self.input_ids.shape}, as those they replace")
        domain = np.zeros_like(self.domain)
        digest = _content_sha256(input_ids, self.lengths, self.document, domain, (name,))
        source = SourceProvenance(name=name, domain=name, sha256=digest, documents=len(np.unique(self.document)))
        named = self._of((name,), [source])
        return named._with(input_ids, self.lengths, self.document, domain)

    def joined(self, others: TokenBlocks) -> TokenBlocks:
        """These rows and then others, of the same length, of the same tokenizer."""
        domains = tuple(dict.fromkeys((*self.domains, *others.domains)))
        place = np.array([domains.index(domain) for domain in others.domains], np.int64)
        return self._of(domains, [*self.provenance.sources, *others.provenance.sources])._with(
            np.concatenate([self.input_ids, others.input_ids]),
            np.concatenate([self.lengths, others.lengths]),
            np.concatenate([self.document, others.document + 1 + self.document.max(initial=-1)]),
            np.concatenate([self.domain, place[others.domain]]),
        )

    def truncated(self, max_length: int) -> TokenBlocks:
        """The first tokens of each row."""
        lengths = np.minimum(self.lengths, max_length)
        return self._with(self.input_ids[:, :max_length], lengths, self.document, self.domain)

    def _of(self, domains: tuple[str, ...], sources: list[SourceProvenance]) -> TokenBlocks:
        update = {"domains": list(domains), "sources": sources}
        return replace(self, domains=domains, provenance=self.provenance.model_copy(update=update))

    def _with(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        document: NDArray[np.int64],
        domain: NDArray[np.int64],
    ) -> TokenBlocks:
        counts = np.bincount(domain, minlength=len(self.domains))
        provenance = self.provenance.model_copy(
            update={
                "blocks": len(input_ids),
                "max_length": int(input_ids.shape[1]),
                "tokens": int(lengths.sum()),
                "documents": len(np.unique(document)),
                "blocks_per_domain": dict(zip(self.domains, map(int, counts), strict=True)),
                "content_sha256": _content_sha256(input_ids, lengths, document, domain, self.domains),
            }
        )
        return replace(
            self, input_ids=input_ids, lengths=lengths, document=document, domain=domain, provenance=provenance
        )


def build_blocks(
    specs: Iterable[str | Path] | str | Path | None,
    tokenizer: Any | None,
    *,
    samples: int = 128,
    max_length: int = 512,
    seed: int = 0,
    add_bos: bool = False,
    chat_template: bool = False,
    layout: Layout = "blocks",
) -> TokenBlocks:
    """Read sources, tokenize as much of them as needed, and choose `samples` blocks by seed.

    Args:
        specs: Sources as `-d` takes them, e.g. `notes.txt`, `math=proofs.jsonl`, `hub:owner/name`, `builtin:code`;
            none or an empty list stands for the built-in corpus.
        tokenizer: Tokenizer of the model, or None if all sources hold `input_ids`.
        samples: Blocks to choose, in equal shares per domain.
        max_length: Tokens of a block, BOS included.
        seed: Seed of the choice, >= 0; equal sources, options and seed give equal blocks.
        add_bos: Begin every block with the BOS (CLS for encoders).
        chat_template: Write `messages` with the tokenizer's chat template.
        layout: `blocks` or `documents`.

    Raises:
        CorpusError: A source cannot be read, or no document fills one block.
        UsageError: An option out of range.
    """
    _check(samples, max_length, seed, layout)
    limit = _HUB_CHARACTERS_PER_TOKEN * samples * max_length
    encoder = Encoder(tokenizer, add_bos=add_bos, chat_template=chat_template)
    listed = [specs] if isinstance(specs, str | Path) else list(specs or ())
    sources, documents = _read([str(spec) for spec in listed] or ["builtin"], limit)
    if chat_template and not any(document.messages for document in documents):
        raise CorpusError("--chat-template: no document has `messages`; leave the option out, or give conversations")

    def blocks_of(document: Document) -> tuple[list[NDArray[np.int64]], int, int]:
        ids = encoder.encode(document)
        blocks, unused = cut(ids, max_length, bos_id=encoder.bos_id, whole=layout == "documents")
        return blocks, ids.size, unused

    by_domain: dict[str, list[tuple[int, Document]]] = {}
    for number, document in enumerate(documents):
        parts = _parts(document, chat_template)
        by_domain.setdefault(document.domain, []).extend(
            (number, part) for part in (parts if layout == "blocks" else parts[:1])
        )
    pools = [DomainPool(name, numbered, blocks_of, seed) for name, numbered in by_domain.items()]
    shares = share_out(pools, samples)
    rows = interleave([pool.take(share) for pool, share in zip(pools, shares, strict=True)])
    if not rows:
        raise CorpusError(_too_short(pools, max_length, encoder.bos_id is not None))

    lengths = np.array([block.ids.size for _, block in rows], dtype=np.int64)
    input_ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for row, (_, block) in enumerate(rows):
        input_ids[row, : block.ids.size] = block.ids
    document_of = np.array([block.document for _, block in rows], dtype=np.int64)
    domain_of = np.array([domain for domain, _ in rows], dtype=np.int64)
    domains = tuple(by_domain)
    provenance = CorpusProvenance(
        sources=sources,
        layout=layout,
        blocks=len(rows),
        max_length=max_length,
        tokens=int(lengths.sum()),
        documents=len(np.unique(document_of)),
        domains=list(domains),
        blocks_per_domain=dict(zip(domains, shares, strict=True)),
        seed=seed,
        add_bos=add_bos,
        chat_template_sha256=encoder.chat_template_sha256,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        content_sha256=_content_sha256(input_ids, lengths, document_of, domain_of, domains),
    )
    return TokenBlocks(
        input_ids=input_ids,
        lengths=lengths,
        document=document_of,
        domain=domain_of,
        domains=domains,
        provenance=provenance,
        dropped_documents=sum(pool.short_documents for pool in pools),
        dropped_tokens=sum(pool.unused_tokens for pool in pools),
        notes=_notes(pools, shares, samples, max_length),
    )


def _check(samples: int, max_length: int, seed: int, layout: str) -> None:
    if samples < 1:
        raise UsageError(f"--samples {samples}: not positive; give 1 or more")
    if max_length < 2:
        raise UsageError(f"--max-length {max_length}: too short; give 2 or more tokens")
    if seed < 0:
        raise UsageError(f"--seed {seed}: negative; give 0 or more")
    if layout not in ("blocks", "documents"):
        raise UsageError(f"layout {layout!r}: unknown; choose 'blocks' or 'documents'")


def _read(specs: Sequence[str], hub_characters: int) -> tuple[list[SourceProvenance], list[Document]]:
    """Read all sources; one that holds several domains has one provenance record for each."""
    sources: list[SourceProvenance] = []
    documents: list[Document] = []
    for spec in specs:
        domain, path = parse_source(spec)
        read = list(read_documents(path, domain, max_characters=hub_characters))
        documents += read
        name = source_name(path)
        for label in dict.fromkeys(document.domain for document in read):
            group = [document for document in read if document.domain == label]
            of_builtin = path.partition(":")[2] or (None if domain else label)
            licence = builtin_licence(of_builtin) if name == "builtin" else None
            sources.append(
                SourceProvenance(
                    name=name, domain=label, sha256=hash_documents(group), documents=len(group), licence=licence
                )
            )
    return sources, documents


def _parts(document: Document, chat_template: bool) -> list[Document]:
    """Part a long text at line ends, or where a line is longer than a part, at its last blank or anywhere."""
    text = document.text
    if text is None or len(text) <= _PART or document.token_ids or (document.messages and chat_template):
        return [document]
    parts = []
    start = 0
    while start < len(text):
        stop = min(start + _PART, len(text))
        if stop < len(text):
            stop = max(text.rfind("\n", start, stop), text.rfind(" ", stop - 4096, stop - 1)) + 1 or stop
        parts.append(replace(document, text=text[start:stop], messages=None))
        start = stop
    return parts


def _too_short(pools: list[DomainPool[Document]], max_length: int, bos: bool) -> str:
    documents = sum(pool.short_documents for pool in pools)
    tokens = sum(pool.tokens for pool in pools)
    longest = max((pool.longest for pool in pools), default=0)
    return (
        f"corpus: no document fills one block of {max_length} tokens ({documents} documents, {tokens} tokens, "
        f"{longest} in the longest); pass --max-length {max(2, longest + bos)} or less, or give longer documents"
    )


def _notes(pools: list[DomainPool[Document]], shares: list[int], samples: int, max_length: int) -> tuple[str, ...]:
    notes = []
    for pool, share in zip(pools, shares, strict=True):
        if pool.short_documents:
            notes.append(
                f"{pool.name}: {pool.short_documents} document(s) shorter than one block of {max_length} tokens left "
                "out; a lower --max-length keeps more of them"
            )
        if not share:
            notes.append(f"{pool.name}: no block was chosen; the domain is not measured")
    if sum(shares) < samples:
        notes.append(f"corpus: {sum(shares)} of the {samples} blocks asked for; there is no more text")
    return tuple(notes)


def _content_sha256(
    input_ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    document: NDArray[np.int64],
    domain: NDArray[np.int64],
    domains: tuple[str, ...],
) -> str:
    digest = hashlib.sha256(repr((input_ids.shape, domains)).encode())
    for array in (input_ids, lengths, document, domain):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()
