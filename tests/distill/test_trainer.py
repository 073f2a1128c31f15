# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from calib.distill.guard import GuardLimits
from calib.distill.trainer import McmiTrainer
from calib.errors import UsageError


class Wrapped(nn.Module):
    """A plain network with the call of a transformers classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None, **rest: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.network(inputs))


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[number], "labels": self.labels[number]}


def trained(mixture: Any, folder: Path, strength: float, **options: Any) -> McmiTrainer:
    inputs, labels, _ = mixture.train.tensors
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=options.pop("learning_rate", 1e-3),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
    )
    trainer = McmiTrainer(
        model=Wrapped(mixture.copy()),
        args=arguments,
        train_dataset=Rows(inputs, labels),
        strength=strength,
        **options,
    )
    trainer.train()
    return trainer


def test_the_trainer_raises_cmi_and_its_control_does_not(mixture: Any, tmp_path: Path) -> None:
    mcmi, control = trained(mixture, tmp_path / "a", 0.5), trained(mixture, tmp_path / "b", 0.0)
    assert mcmi.stopped is None
    assert len(mcmi.history) == 4
    assert mcmi.history[0] == control.history[0]
    assert mcmi.history[-1].cmi > mcmi.history[0].cmi > control.history[-1].cmi


def test_centroids_are_those_of_the_model_after_the_last_epoch(mixture: Any, tmp_path: Path) -> None:
    trainer = trained(mixture, tmp_path, 0.25)
    inputs, labels, _ = mixture.train.tensors
    with torch.no_grad():
        p = torch.softmax(trainer.model.network(inputs).double(), 1)
    expected = torch.stack([p[labels == y].mean(0) for y in range(10)]).float()
    torch.testing.assert_close(trainer.centroids.rows, expected.clamp(min=1e-8), rtol=1e-5, atol=1e-7)


def test_a_collapse_ends_the_training_and_is_named(mixture: Any, tmp_path: Path) -> None:
    trainer = trained(mixture, tmp_path, 0.5, learning_rate=1.0, guard=GuardLimits(accuracy_drop=0.05))
    assert trainer.stopped is not None
    assert "fell" in trainer.stopped
    assert len(trainer.history) == 2


def test_weights_that_became_infinite_end_the_training_and_are_named(mixture: Any, tmp_path: Path) -> None:
    trainer = trained(mixture, tmp_path, 0.5, learning_rate=1e30)
    assert "NaN or infinite" in str(trainer.stopped)
    assert len(trainer.history) == 1


def test_a_strength_that_minimises_is_refused(mixture: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="always maximises"):
        trained(mixture, tmp_path, -0.2)
