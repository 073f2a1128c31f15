# SPDX-License-Identifier: Apache-2.0
"""Sound as the inputs of a model, made by the feature extractor of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from calib.corpus.media import Media, open_sound
from calib.distill.data.records import Records
from calib.errors import CorpusError

__all__ = ["SoundSet"]


class SoundSet(Dataset[tuple[Any, int, int]]):
    """Samples (float32 `[n]` at the rate of the model, label, number); `collate` makes batches of them.

    Args:
        records: paths of PCM .wav files, their bytes, or float tensors `[n]` at the rate of the model.
        extractor: a feature extractor of transformers.

    Raises:
        CorpusError: there is no extractor.
    """

    def __init__(self, records: Records, extractor: Any | None) -> None:
        rate = getattr(extractor, "sampling_rate", None)
        if extractor is None or rate is None:
            raise CorpusError(
                f"data {records.source}: the model has no feature extractor for sound; "
                "add preprocessor_config.json to the checkpoint"
            )
        self.records, self.extractor, self.rate = records, extractor, int(rate)
        self.labels = torch.tensor(records.labels)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[Any, int, int]:
        found = self.records.inputs[number]
        if isinstance(found, Tensor):
            return found.float().numpy(), int(self.labels[number]), number
        if isinstance(found, dict):  # as parquet files of data sets hold it
            media = Media(Path(str(found.get("path") or f"sample {number}")), found.get("bytes"))
        elif isinstance(found, str | Path):
            media = Media(Path(found))
        else:
            raise CorpusError(f"data {self.records.source}: sample {number} is no sound; pass .wav files")
        return open_sound(media, self.rate, f"sound {media.path}"), int(self.labels[number]), number

    def collate(self, samples: Sequence[tuple[Any, int, int]]) -> dict[str, Tensor]:
        """What the extractor makes of the sounds, padded to the longest, with `labels` and `index`."""
        sounds, labels, numbers = zip(*samples, strict=True)
        made = self.extractor(list(sounds), sampling_rate=self.rate, padding=True, return_tensors="pt")
        batch = {name: made[name] for name in made}
        return batch | {"labels": torch.tensor(labels), "index": torch.tensor(numbers)}
