# SPDX-License-Identifier: Apache-2.0
"""The page about files names every field that a reader meets, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from calib.schema.measurement import MeasurementFile, SiteRecord
from calib.schema.scales import ScaleFile, TensorScale

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
SCALES, MEASUREMENT = PAGE.split("\n## ")[1:]


def fields_of(table: str) -> set[str]:
    """Names in the first column."""
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(
    ("table", "model"),
    [
        (SCALES, ScaleFile),
        (MEASUREMENT.split("| field of a site |")[0], MeasurementFile),
        (MEASUREMENT.split("| field of a site |")[1], SiteRecord),
    ],
)
def test_every_field_is_explained(table: str, model: type[BaseModel]) -> None:
    assert fields_of(table) == set(model.model_fields)


def test_every_field_of_a_tensor_is_listed() -> None:
    (row,) = (line for line in SCALES.splitlines() if line.startswith("| `tensors`"))
    assert set(re.findall(r"`(\w+)`", row)) == {"tensors", *TensorScale.model_fields}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link
