# SPDX-License-Identifier: Apache-2.0
"""Reuters-R8 split, and MiniLM fine-tuned on it: by log-likelihood, then with each lambda; kept outside the repository.

A tenth of the training part is validation data for every choice and is never trained on; the test part is only judged
by. Embedding tables stay as they were: they are half of a model, and their update half the time of a step.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from assets import fetch
from finished_runs import FinishedRuns
from reuters import Topics, topics
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calib.distill import StudentSettings, TeacherSettings, fine_tune, measure_information, train_student
from calib.distill.classifier import Classifier
from calib.distill.data import Records, split_off
from calib.distill.encoder import EncoderClassifier
from calib.distill.optimiser import OptimiserSettings
from calib.distill.task import ClassificationTask
from calib.models import open_model

TOKENS, CLASSES, VALIDATION, BATCH = 32, 8, 0.1, 32
TRAINING = StudentSettings(epochs=2, optimiser=OptimiserSettings("adamw", 1e-4, 0.01, schedule="cosine"))
TUNING = TeacherSettings(epochs=1, optimiser=OptimiserSettings("adamw", 2e-5, 0.01, schedule="cosine"))
Strength = float | None
"""Lambda, or None for the teacher as trained by log-likelihood."""


@dataclass(frozen=True)
class TextData:
    """Documents without a sample in common between the parts."""

    train: Records
    validation: Records
    test: Records


@lru_cache(maxsize=1)
def text_data() -> TextData:
    """All of Reuters-R8; a document of the test part that is also in the training part is left out of the latter."""
    everything = 10**6
    first, second = topics(everything, everything)
    pool, test = records(first, "train"), records(second, "test")
    held_out = set(test.inputs)
    pool = pool.select([n for n, text in enumerate(pool.inputs) if text not in held_out])
    parts = split_off(pool, VALIDATION)
    return TextData(parts.train, parts.validation, test)


def records(part: Topics, name: str) -> Records:
    """Topics as records."""
    labels = tuple(int(label) for label in part.labels)
    return Records(part.texts, labels, tuple(map(str, range(CLASSES))), f"R8 {name}")


def minilm() -> Classifier:
    """MiniLM with its six layers and a fresh head."""
    opened = open_model(fetch("minilm"), task="feature-extraction", device="cpu", dtype="float32")
    model = EncoderClassifier(opened.model, CLASSES)
    freeze_embeddings(model)
    return Classifier(
        model, "text", CLASSES, "MiniLM", ClassificationTask(), tokenizer=opened.tokenizer, max_length=TOKENS
    )


def freeze_embeddings(model: nn.Module) -> None:
    """Leaves tables of embeddings as they are."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(requires_grad=False)


def teacher(strength: Strength = None) -> tuple[Classifier, dict[str, Any]]:
    """The teacher and what it is worth on each part."""
    data = text_data()
    key = {
        "samples": len(data.train),
        "tokens": TOKENS,
        "batch": BATCH,
        "lambda": strength,
        "training": [TRAINING.epochs, asdict(TRAINING.optimiser)],
        "tuning": None if strength is None else [TUNING.epochs, asdict(TUNING.optimiser)],
    }
    finished = FinishedRuns("distill_text_teachers")
    path = _kept(finished, key, "weights")
    torch.manual_seed(0)
    found = minilm()
    if path.exists():
        found.model.load_state_dict(load_file(path))
        return found, finished.of(key, lambda: _row(found, strength, None, None))
    begin, stopped = time.process_time(), None
    if strength is None:
        loader = found.batches(data.train, BATCH, shuffle=True, drop_last=True)
        train_student(found.model, None, loader, "ce", TRAINING, progress=_say)
    else:
        found = replace(found, model=copy.deepcopy(teacher(None)[0].model))
        loader = found.batches(data.train, BATCH, shuffle=True, drop_last=True)
        stopped = fine_tune(found.model, loader, replace(TUNING, strength=strength), progress=_say).stopped
    seconds = round(time.process_time() - begin, 1)
    save_file({name: tensor.contiguous() for name, tensor in found.model.state_dict().items()}, path)
    return found, finished.of(key, lambda: _row(found, strength, stopped, seconds))


class Remembering(nn.Module):
    """A frozen teacher whose logits of the training documents are known: every student sees the same documents."""

    def __init__(self, classifier: Classifier, data: Records, strength: Strength) -> None:
        super().__init__()
        self.model = classifier.model.eval()
        finished = FinishedRuns("distill_text_teachers")
        weights = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        digest = hashlib.sha256(weights).hexdigest()
        path = _kept(finished, {"lambda": strength, "weights": digest, "samples": len(data)}, "logits")
        batches = classifier.batches(data, BATCH)
        if not path.exists():
            with torch.no_grad():
                logits = [self.model(b["input_ids"], b["attention_mask"]) for b in batches]
            save_file({"logits": torch.cat(logits)}, path)
        keys = [key for batch in batches for key in _documents(batch["input_ids"], batch["attention_mask"])]
        self.known = dict(zip(keys, load_file(path)["logits"], strict=True))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Logits `[n, C]`; computed for documents that it has not seen."""
        keys = _documents(input_ids, attention_mask)
        if any(key not in self.known for key in keys):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[no-any-return]
        return torch.stack([self.known[key] for key in keys])


def _documents(input_ids: Tensor, attention_mask: Tensor) -> list[bytes]:
    return [bytes(row[mask.bool()].numpy()) for row, mask in zip(input_ids, attention_mask, strict=True)]


def _kept(finished: FinishedRuns, key: dict[str, Any], what: str) -> Path:
    folder = finished.path.parent / "distill-text-teachers"
    folder.mkdir(exist_ok=True)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{digest}.{what}.safetensors"


def _row(found: Classifier, strength: Strength, stopped: str | None, seconds: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"lambda": strength, "stopped": stopped, "cpu_seconds": seconds}
    data = text_data()
    for name, part in (("validation", data.validation), ("test", data.test)):
        summary = measure_information(found.model, found.batches(part, 64), separation=False)[0].summary()
        row[name] = {
            "accuracy": summary.accuracy,
            "cmi": summary.cmi,
            "log_likelihood": summary.log_likelihood,
            "ece": summary.ece,
        }
    _say(str(row))
    return row


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in [None, *map(float, sys.argv[1:])]:
        teacher(one)
