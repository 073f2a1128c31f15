# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is quantized already is measured as it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.corpus import TokenBlocks
from calib.measurement import MeasureOptions, measure
from calib.models import open_model
from tests.cli.commands import SMALL, run


@pytest.fixture(scope="module")
def int8(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static W8A8 compressed-tensors checkpoint."""
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    assert run("quantize", tiny_llama, "--bits", "8", "-o", folder, *SMALL, "-q") in (0, 3)
    return folder


def test_nothing_but_calib_writes_while_it_is_opened(int8: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_model(int8, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_compressed_tensors_checkpoint_is_measured(int8: Path, blocks: TokenBlocks) -> None:
    opened = open_model(int8, device="cpu")
    assert opened.model.config.quantization_config is not None
    measurement = measure(opened, blocks, MeasureOptions(batch_size=5, weights=False))
    assert measurement.passed
    seen: dict[str, list[torch.Tensor]] = {}
    names = [name for name, m in opened.model.named_modules() if name.endswith(("down_proj", "o_proj"))]
    handles = [
        opened.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        opened.model(torch.from_numpy(blocks.input_ids), use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == 6
    for name, (values,) in seen.items():
        span = measurement.sites[f"{name}:input"].statistics.range
        assert (span.min, span.max, span.count_all) == (values.min().item(), values.max().item(), values.numel())
