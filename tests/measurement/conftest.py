# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from calib.corpus import TokenBlocks, build_blocks
from calib.measurement import Measurement, MeasureOptions, measure
from calib.models import OpenedModel, open_model


@pytest.fixture(scope="package")
def llama(tiny_llama: Path) -> OpenedModel:
    """The tiny Llama, opened; tests that change it open their own."""
    return open_model(tiny_llama, device="cpu")


@pytest.fixture(scope="package")
def blocks(llama: OpenedModel, tmp_path_factory: pytest.TempPathFactory) -> TokenBlocks:
    """Five blocks of 24 tokens of two domains."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "whale.txt").write_text("The whale swam through the cold water, and the sailors watched it. " * 8)
    (folder / "scale.txt").write_text("What is measured once can be decided forever: scale and clipping. " * 8)
    paths = [str(folder / "whale.txt"), str(folder / "scale.txt")]
    return build_blocks(paths, llama.tokenizer, samples=5, max_length=24)


@pytest.fixture(scope="package")
def whole(llama: OpenedModel, blocks: TokenBlocks) -> Measurement:
    """All blocks in three batches."""
    return measure(llama, blocks, MeasureOptions(batch_size=2))
