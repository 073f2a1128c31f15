# SPDX-License-Identifier: Apache-2.0
"""Example rows: pictures, sound and pairs of text in the order in which they run, chosen by seed, with provenance.

A row is opened and prepared when it runs, so that a thousand pictures cost no memory, and once before, so that what
cannot be read is told before the first forward pass and the hash is of what the model gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.corpus.documents import parse_source, source_name
from calib.corpus.examples import Example, hash_examples, read_examples
from calib.corpus.preparation import Preparation
from calib.corpus.rows import RowInputs
from calib.corpus.selection import DomainPool, interleave, share_out
from calib.corpus.tokens import tokenizer_sha256
from calib.errors import CorpusError, UsageError
from calib.schema.provenance import CorpusProvenance, SourceProvenance

if TYPE_CHECKING:
    import torch

__all__ = ["ExampleRows", "build_examples"]

_ROWS = 8
"""Most rows of a batch where all have one shape."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class ExampleRows:
    """One example per row.

    Attributes:
        examples: in the order in which they run.
        preparation: makes arguments of an example.
        lengths: int64 `[n]`, tokens of text, those that stand for pictures included; 1 where a row has none.
        document: int64 `[n]`, number of the example in the order in which the sources were read, from 0.
        domain: int64 `[n]`, index into the domains of the provenance.
        shapes: names and shapes of the arguments of each row.
        provenance: sources, options and hashes.
        notes: what a user should know, a line each.
    """

    examples: tuple[Example, ...]
    preparation: Preparation
    lengths: NDArray[np.int64]
    document: NDArray[np.int64]
    domain: NDArray[np.int64]
    shapes: tuple[Shapes, ...]
    provenance: CorpusProvenance
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, batch_size: int) -> list[NDArray[np.int64]]:
        """Return the row indices of consecutive batches, int64 `[batch_size]` each, the last one maybe shorter.

        Raises:
            UsageError: rows of unequal shapes cannot be one batch without padding, which would count.
        """
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size}: not positive; give 1 or more")
        if batch_size > 1 and len(set(self.shapes)) > 1:
            raise UsageError(f"--batch-size {batch_size}: these examples have unequal shapes; pass 1, or leave it out")
        rows = np.arange(len(self), dtype=np.int64)
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def rows_per_batch(self, tokens: int) -> int:
        """How many rows make a batch: one where shapes differ, else at most 8 of about `tokens` tokens."""
        if len(set(self.shapes)) > 1:
            return 1
        return max(1, min(_ROWS, tokens // int(self.lengths.max())))

    def inputs(self, rows: NDArray[Any], width: int | None = None) -> RowInputs:
        """What the model is called with; pictures are never cut, so `width` means nothing here."""
        import torch

        made = [self.preparation.tensors(self.examples[row]) for row in rows]
        tensors = {name: torch.cat([row[name] for row in made]) if len(made) > 1 else made[0][name] for name in made[0]}
        return RowInputs(tensors, tuple(self.preparation.target(self.examples[row]) for row in rows))


def build_examples(
    specs: Sequence[str], preparation: Preparation, tokenizer: Any | None, *, samples: int, max_length: int, seed: int
) -> ExampleRows:
    """Read sources, choose `samples` examples by seed in equal shares per domain, and prepare each once.

    Args:
        specs: sources as `-d` takes them: folders of pictures or .wav files, .jsonl, .parquet.
        preparation: of the model.
        tokenizer: its tokenizer, for the provenance.
        samples: examples to choose.
        max_length: recorded; texts without pictures and targets were cut to it.
        seed: of the choice, >= 0.

    Raises:
        CorpusError: a source or an example cannot be read.
        UsageError: an option out of range.
    """
    if samples < 1:
        raise UsageError(f"--samples {samples}: not positive; give 1 or more")
    if seed < 0:
        raise UsageError(f"--seed {seed}: negative; give 0 or more")
    sources: list[SourceProvenance] = []
    examples: list[Example] = []
    for spec in specs:
        read = list(read_examples(spec))
        if not read:
            raise CorpusError(f"{spec}: holds no examples; give pictures, .wav files or records")
        examples += read
        for label in dict.fromkeys(example.domain for example in read):
            group = [example for example in read if example.domain == label]
            name = source_name(parse_source(spec)[1])
            sources.append(SourceProvenance(name=name, domain=label, sha256=hash_examples(group), documents=len(group)))
    domains = list(dict.fromkeys(example.domain for example in examples))
    numbers = {name: [n for n, e in enumerate(examples) if e.domain == name] for name in domains}
    pools = [DomainPool(name, [(n, n) for n in numbers[name]], _one_row, seed) for name in domains]
    shares = share_out(pools, samples)
    chosen = interleave([pool.take(share) for pool, share in zip(pools, shares, strict=True)])
    rows = tuple(examples[block.document] for _, block in chosen)
    digest, lengths, shapes, targets = hashlib.sha256(repr(domains).encode()), [], [], 0
    for row in rows:
        tensors, target = preparation.tensors(row), preparation.target(row)
        shapes.append(tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())))
        _digest(digest, row, tensors, target)
        ids = tensors.get("input_ids")
        lengths.append(0 if ids is None else int(ids.shape[-1]))
        targets += target is not None
    document = np.array([block.document for _, block in chosen], np.int64)
    held = {
        "image": sum(len(row.images) for row in rows),
        "audio": sum(row.audio is not None for row in rows),
        "target": targets,
    }
    provenance = CorpusProvenance(
        sources=sources,
        layout="examples",
        blocks=len(rows),
        max_length=max_length,
        tokens=sum(lengths),
        documents=len(rows),
        domains=domains,
        blocks_per_domain=dict(zip(domains, shares, strict=True)),
        seed=seed,
        add_bos=False,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        content_sha256=digest.hexdigest(),
        holds={kind: count for kind, count in held.items() if count},
    )
    return ExampleRows(
        examples=rows,
        preparation=preparation,
        lengths=np.maximum(np.array(lengths, np.int64), 1),
        document=document,
        domain=np.array([domain for domain, _ in chosen], np.int64),
        shapes=tuple(shapes),
        provenance=provenance,
        notes=_notes(sum(shares), samples, max(lengths), max_length),
    )


def _one_row(number: int) -> tuple[list[NDArray[np.int64]], int, int]:
    return [np.array([number], np.int64)], 1, 0


def _digest(digest: Any, row: Example, tensors: dict[str, torch.Tensor], target: NDArray[np.int64] | None) -> None:
    digest.update(row.domain.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode() + tensors[name].contiguous().numpy().tobytes())
    if target is not None:
        digest.update(b"target" + target.astype("<i8").tobytes())


def _notes(chosen: int, samples: int, longest: int, max_length: int) -> tuple[str, ...]:
    notes = []
    if chosen < samples:
        notes.append(f"corpus: {chosen} of the {samples} examples asked for; there are no more")
    if longest > max_length:
        notes.append(
            f"corpus: examples reach {longest} tokens; with pictures or sound they are not cut to --max-length"
        )
    return tuple(notes)
