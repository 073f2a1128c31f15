# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from calib.corpus import build_blocks
from calib.export import verify_export
from calib.export.manifest import MANIFEST
from calib.measurement import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.models.hashing import sha256_of_file
from calib.scales import choose_scales
from calib.schema.scales import ScaleFile


@dataclass(frozen=True)
class Lab:
    """A model and its measurement."""

    opened: OpenedModel
    measurement: Measurement

    def scales(self, **options: Any) -> ScaleFile:
        return choose_scales(self.measurement, **options)


def lab(folder: Path, samples: int = 4, max_length: int = 32, corpus: str = "builtin:speeches") -> Lab:
    opened = open_model(folder, device="cpu", dtype="float32")
    blocks = build_blocks([corpus], opened.tokenizer, samples=samples, max_length=max_length)
    return Lab(opened, measure(opened, blocks, MeasureOptions()))


@pytest.fixture(scope="session")
def llama(tiny_llama: Path) -> Lab:
    return lab(tiny_llama)


@pytest.fixture(scope="session")
def bert(tiny_bert: Path) -> Lab:
    return lab(tiny_bert)


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2: Path) -> Lab:
    return lab(tiny_gpt2)


def problems_of_changed_graph(change: Callable[[Any], None], graph: Path, copy: Path) -> list[str]:
    """What `verify_export` says of a copy whose graph was changed, and whose manifest knows of the change."""
    import onnx

    folder = shutil.copytree(graph, copy)
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["model.onnx"] = sha256_of_file(folder / "model.onnx")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return verify_export(folder, run=False).problems
