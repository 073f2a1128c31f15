# SPDX-License-Identifier: Apache-2.0
"""Labelled images, texts and sound: folders, files and hub data sets, read into data sets that PyTorch loaders take."""

from __future__ import annotations

from calib.distill.data.encoded import ImageSet, TextSet, collate_texts
from calib.distill.data.read import read_records
from calib.distill.data.records import Records
from calib.distill.data.sound import SoundSet
from calib.distill.data.splits import SplitRecords, split_off, spread_over_classes, stratified_share

__all__ = [
    "ImageSet",
    "Records",
    "SoundSet",
    "SplitRecords",
    "TextSet",
    "collate_texts",
    "read_records",
    "split_off",
    "spread_over_classes",
    "stratified_share",
]
