# SPDX-License-Identifier: Apache-2.0
"""Static INT8 by other programs, each in its own environment, for the table of benchmarks/quality.py.

`make consumer-llmcompressor consumer-modelopt` installs two of them; torchao runs in the environment of calib. All get
the same tokens to calibrate with, and quantize all linear layers but the head, with one scale per tensor of activations
and one per weight row. They have no search: each runs at one strength, close to where smoothing is best for this model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.models import OpenedModel

__all__ = ["PeerResult", "peer_results"]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class _Peer:
    """A program, where it runs, and at which settings."""

    script: str
    environment: str  # of .consumers; empty: that of calib
    settings: dict[str, Any]

    @property
    def python(self) -> Path:
        return ROOT / ".consumers" / self.environment / "bin/python" if self.environment else Path(sys.executable)


PEERS = {
    "ModelOpt, SmoothQuant 0.8": _Peer("modelopt_peer.py", "modelopt", {"alpha": 0.8}),
    "llm-compressor, SmoothQuant 0.8": _Peer(
        "llmcompressor_peer.py", "llmcompressor", {"alpha": 0.8, "down_proj": False}
    ),
    "llm-compressor, SmoothQuant 0.8, down_proj too": _Peer(
        "llmcompressor_peer.py", "llmcompressor", {"alpha": 0.8, "down_proj": True}
    ),
    "torchao, SmoothQuant 0.75": _Peer("torchao_peer.py", "", {"alpha": 0.75}),
}


@dataclass(frozen=True)
class PeerResult:
    """What one program made of the model.

    Attributes:
        name: program and setting.
        nll: nats per token, float64 ``[blocks, tokens]``.
        version: of the program.
        seconds: that it took to quantize.
    """

    name: str
    nll: NDArray[np.float64]
    version: str
    seconds: float


def peer_results(
    opened: OpenedModel, calibration: NDArray[np.int64], evaluation: NDArray[np.int64], work: Path, done: set[str]
) -> Iterator[PeerResult]:
    """Runs each program that is installed and not done.

    Args:
        opened: the float model.
        calibration: token ids ``[blocks, tokens]``.
        evaluation: token ids ``[blocks, tokens]``.
        work: folder for the checkpoint and what is passed to and fro.
        done: names to leave out.
    """
    source, tokens = work / "model", work / "tokens.json"
    opened.model.save_pretrained(source)
    opened.tokenizer.save_pretrained(source)
    texts = {"calibration": calibration.tolist(), "evaluation": evaluation.tolist()}
    tokens.write_text(json.dumps(texts), encoding="utf-8")
    for name, peer in PEERS.items():
        if name in done:
            continue
        if not peer.python.exists():
            print(f"{name}: left out, make consumer-{peer.environment} installs it", flush=True)
            continue
        settings, out = work / "settings.json", work / "out.npz"
        settings.write_text(json.dumps(peer.settings), encoding="utf-8")
        script = Path(__file__).parent / "peers" / peer.script
        subprocess.run([peer.python, script, source, tokens, settings, out], check=True, cwd=work)
        with np.load(out) as found:
            yield PeerResult(name, found["nll"], str(found["version"]), round(float(found["seconds"]), 1))
