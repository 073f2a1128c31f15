# SPDX-License-Identifier: Apache-2.0
"""A problem of seconds: ten overlapping Gaussian clusters, and a small network trained on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, CLASSES = 32, 10


@dataclass(frozen=True)
class Mixture:
    train: TensorDataset
    validation: TensorDataset
    teacher: nn.Module

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.teacher)

    def loader(self, part: str = "train", shuffle: bool = True) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(getattr(self, part), batch_size=64, shuffle=shuffle)


def network(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


@pytest.fixture(scope="session")
def mixture() -> Mixture:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        means = torch.randn(CLASSES, WIDTH) * 0.45

        def draw(count: int) -> TensorDataset:
            labels = torch.arange(count) % CLASSES
            return TensorDataset(means[labels] + torch.randn(count, WIDTH), labels, torch.arange(count))

        train, validation = draw(800), draw(400)
        teacher = network()
        optimiser = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
        for _ in range(12):
            for inputs, labels, _index in DataLoader(train, batch_size=64, shuffle=True):
                optimiser.zero_grad()
                nn.functional.cross_entropy(teacher(inputs), labels).backward()
                optimiser.step()
        teacher.zero_grad()
    return Mixture(train, validation, teacher.eval())


@pytest.fixture(scope="session")
def text_classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BertForSequenceClassification with classes that have names, untrained."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("text_classifier")
    names = ["calm", "storm", "whale"]
    config = BertConfig.from_pretrained(
        tiny_bert, id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def minilm_like(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BertModel without a head, 2 layers, untrained."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig.from_pretrained(tiny_bert), add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder
