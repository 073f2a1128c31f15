# SPDX-License-Identifier: Apache-2.0
"""What each peer's program does with its quantized model: the likelihood of the tokens. Imports nothing of calib."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def run(package: str, arguments: list[str], quantize: Callable[[Any, list[list[int]], dict[str, Any]], Any]) -> None:
    """`MODEL TOKENS.json SETTINGS.json OUT.npz`: quantizes MODEL and writes nats per token of the evaluation blocks.

    Args:
        package: of which the version is recorded.
        arguments: of the command line.
        quantize: (float32 model, calibration blocks, settings) -> the quantized model.
    """
    from transformers import AutoModelForCausalLM

    source, tokens, settings, out = arguments
    blocks = json.loads(Path(tokens).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    begin = time.perf_counter()
    model = quantize(model, blocks["calibration"], json.loads(Path(settings).read_text(encoding="utf-8")))
    seconds = time.perf_counter() - begin
    nll = [_nll(model, torch.tensor(rows)) for rows in _fours(blocks["evaluation"])]
    np.savez(out, nll=np.concatenate(nll), seconds=seconds, version=version(package))


def _fours(blocks: list[list[int]]) -> list[list[list[int]]]:
    return [blocks[start : start + 4] for start in range(0, len(blocks), 4)]


def _nll(model: Any, ids: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)
    found: np.ndarray[Any, np.dtype[np.float64]] = -expected.gather(-1, ids[:, 1:, None])[..., 0].double().numpy()
    return found
