# SPDX-License-Identifier: Apache-2.0
"""A tiny model with massive activations, and its measurement by the protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.corpus import TokenBlocks, build_blocks
from calib.measurement.artifact import Measurement
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.protocols.massive_tokens import massive_tokens

Run = tuple[OpenedModel, TokenBlocks, Measurement]


@pytest.fixture(scope="session")
def massive_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama whose second MLP writes thousands into channel 5 of the residual stream for some tokens."""
    folder = tmp_path_factory.mktemp("massive_llama")
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][5] = 1e5 * torch.sign(weights[name][5])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def protocol_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`protocol_run(folder, layout=..., dtype=...)`: opens, measures by the protocol, returns all three.

    With the layout `documents` rows have 5 to about 40 tokens and padding.
    """
    short = tmp_path_factory.mktemp("texts") / "short.jsonl"
    texts = ["The 7 whales swam on; 39 sailors, in silence, measured once!"[i * 3 : i * 9 + 5] for i in range(8)]
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def run(folder: Path, *, layout: str = "blocks", dtype: str = "bfloat16", batch_size: int = 4) -> Run:
        opened = open_model(folder, device="cpu", dtype=dtype)
        data = "builtin:speeches" if layout == "blocks" else str(short)
        blocks = build_blocks([data], opened.tokenizer, samples=8, max_length=48, layout=layout)
        options = MeasureOptions(batch_size=batch_size, protocol="max-activations")
        return opened, blocks, measure(opened, blocks, options, around=massive_tokens)

    return run


@pytest.fixture(scope="session")
def massive_run(massive_llama: Path, protocol_run: Callable[..., Run]) -> Run:
    return protocol_run(massive_llama)
