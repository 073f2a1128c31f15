# SPDX-License-Identifier: Apache-2.0
"""Records as tensors: images scaled and normalised, texts as token ids."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from calib.distill.data.records import Records
from calib.errors import CorpusError

__all__ = ["ImageSet", "TextSet", "collate_texts"]


class ImageSet(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples (image float32 `[C, H, W]`, label, number): pixels in 0..1, minus `mean`, over `std`.

    Float tensors are passed on as they are, whatever their shape: features, spectra, tables.

    Args:
        records: images, paths of images, or float tensors.
        size: height and width to resize to; None keeps each image as it is.
        channels: 1 or 3; grey images are repeated, coloured ones averaged (ITU-R 601).
        mean: of each channel, or one for all.
        std: of each channel, or one for all.
    """

    def __init__(
        self,
        records: Records,
        *,
        size: int | None = None,
        channels: int = 3,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        self.records, self.size, self.channels = records, size, channels
        self.mean, self.std = torch.tensor(list(mean)).view(-1, 1, 1), torch.tensor(list(std)).view(-1, 1, 1)
        self.labels = torch.tensor(records.labels)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        found = self.records.inputs[number]
        index = torch.tensor(number)
        if isinstance(found, Tensor) and found.is_floating_point():
            return found, self.labels[number], index
        pixels = found if isinstance(found, Tensor) else _decoded(found)
        image = _with_channels(pixels.float() / 255, self.channels)
        if self.size is not None and image.shape[1:] != (self.size, self.size):
            image = nn.functional.interpolate(
                image[None], size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )[0]
        return (image - self.mean) / self.std, self.labels[number], index


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 1:
        return image.expand(channels, -1, -1)
    grey = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (image[:3] * grey).sum(dim=0, keepdim=True).expand(channels, -1, -1)


def _decoded(found: Any) -> Tensor:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CorpusError(f"image {found}: decoding needs Pillow; pip install calib[distill]") from error
    try:
        if isinstance(found, dict):  # as parquet files of data sets hold it
            found = io.BytesIO(found["bytes"]) if found.get("bytes") else found.get("path")
        image = Image.open(found) if isinstance(found, str | Path | io.BytesIO) else found
        coloured = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
    except (OSError, UnidentifiedImageError, AttributeError) as error:
        raise CorpusError(f"image {found}: cannot be decoded ({error}); remove or replace it") from error
    raw = torch.frombuffer(bytearray(coloured.tobytes()), dtype=torch.uint8)
    return raw.reshape(coloured.height, coloured.width, -1).permute(2, 0, 1)


class TextSet(Dataset[dict[str, Any]]):
    """Samples with `input_ids`, `attention_mask` (lists), `labels` and `index`; pad them with `collate_texts`.

    Args:
        records: texts.
        tokenizer: a transformers tokenizer.
        max_length: longest sample in tokens; the rest of a text is cut off.
    """

    def __init__(self, records: Records, tokenizer: Any, *, max_length: int = 128) -> None:
        if records.inputs and not isinstance(records.inputs[0], str):
            raise CorpusError(f"data {records.source}: holds no texts; pass a text data set or an image model")
        if tokenizer is None:
            raise CorpusError(f"data {records.source}: the model has no tokenizer; pass one that has")
        encoded = tokenizer(list(records.inputs), truncation=True, max_length=max_length)
        self.fields = {name: values for name, values in encoded.items() if name in tokenizer.model_input_names}
        self.labels = torch.tensor(records.labels)
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample: dict[str, Any] = {name: values[number] for name, values in self.fields.items()}
        return sample | {"labels": int(self.labels[number]), "index": number, "pad_id": self.pad_id}


def collate_texts(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads `TextSet` samples on the right to the longest of the batch."""
    pad_id = samples[0]["pad_id"]
    batch: dict[str, Tensor] = {}
    for name in samples[0]:
        if name in ("labels", "index"):
            batch[name] = torch.tensor([sample[name] for sample in samples])
        elif name != "pad_id":
            rows = [torch.tensor(sample[name]) for sample in samples]
            filling = float(pad_id if name == "input_ids" else 0)
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling)
    return batch
