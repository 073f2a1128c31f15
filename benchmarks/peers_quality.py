# SPDX-License-Identifier: Apache-2.0
"""Static INT8 of SmolLM2-135M by other programs, each in its own environment, beside calib: one run, one text.

    make consumer-llmcompressor consumer-modelopt
    OMP_WAIT_POLICY=PASSIVE python benchmarks/peers_quality.py       # about half an hour on two quiet cores

All get the same 12 x 512 tokens to calibrate with and are judged on the same 48 x 512 tokens, those of
benchmarks/quality.py; all linear layers but the head in INT8, one scale per tensor of activations and one per weight
row. What calib chooses is searched here too. Peers have no search: they run at the strength they are shipped with and
at 0.8, the best that is known for this model. Rows are written as they come, and not computed again (--fresh does).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from assets import fetch
from numpy.typing import NDArray
from quality import LENGTH, blocks_of, book
from results_file import RESULTS, write

from calib.cures import CureOptions, find_cure
from calib.evaluation.interval import perplexity_ratio
from calib.evaluation.language import score_tokens
from calib.measurement import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import QuantizedModel

ROOT = Path(__file__).parents[1]
NAME = "peers_quality"


@dataclass(frozen=True)
class Peer:
    """A program, where it runs, and at which settings."""

    script: str
    environment: str  # of .consumers; empty: the one of calib
    settings: tuple[dict[str, Any], ...]

    @property
    def python(self) -> str:
        return str(ROOT / ".consumers" / self.environment / "bin/python") if self.environment else sys.executable


PEERS = {
    "ModelOpt": Peer("modelopt_peer.py", "modelopt", ({"alpha": 1.0}, {"alpha": 0.8})),
    "torchao": Peer("torchao_peer.py", "", ({"alpha": 0.5}, {"alpha": 0.75}, {"alpha": 0.8})),
    "llm-compressor": Peer(
        "llmcompressor_peer.py",
        "llmcompressor",
        ({"alpha": 0.8, "down_proj": False}, {"alpha": 0.8, "down_proj": True}),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("/tmp/calib-peers"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    opened = open_model(fetch("smollm2"), device="cpu")
    ids = book(opened, work)
    evaluation = ids[200_000 : 200_000 + arguments.blocks * LENGTH].reshape(-1, LENGTH)
    calibration = blocks_of(opened, ids, 20_000, 12, work)
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not arguments.fresh else {}

    def save(name: str, nll: NDArray[np.float64], reference: NDArray[np.float64], **more: object) -> None:
        row: dict[str, Any] = dict(more)
        for blocks in (12, arguments.blocks):
            ratio = perplexity_ratio(nll[:blocks], reference[:blocks])
            row[f"blocks_{blocks}"] = {
                "perplexity": round(float(np.exp(nll[:blocks].mean())), 4),
                "ratio": round(ratio.value, 5),
                "low": round(ratio.low, 5),
                "high": round(ratio.high, 5),
            }
        rows[name] = row
        write(NAME, {"model": "SmolLM2-135M-Instruct (dequantized from Q4_1)", "text": "Moby-Dick", "length": LENGTH,
                     "ratio": "to the float model with the same tokens in context", "rows": rows})  # fmt: skip
        print(name, row, flush=True)

    reference = score_tokens(opened.model, evaluation).nll
    save("float", reference, reference)
    source, tokens = work / "model", work / "tokens.json"
    opened.model.save_pretrained(source)
    opened.tokenizer.save_pretrained(source)
    texts = {"calibration": calibration.input_ids.tolist(), "evaluation": evaluation.tolist()}
    tokens.write_text(json.dumps(texts), encoding="utf-8")
    for peer_name, peer in PEERS.items():
        for settings in peer.settings:
            name = f"{peer_name} {', '.join(f'{key} {value}' for key, value in settings.items())}"
            if name in rows:
                continue
            chosen, out = work / "settings.json", work / "out.npz"
            chosen.write_text(json.dumps(settings), encoding="utf-8")
            script = Path(__file__).parent / "peers" / peer.script
            subprocess.run([peer.python, script, source, tokens, chosen, out], check=True, cwd=work)
            with np.load(out) as found:
                more = {"version": str(found["version"]), "seconds": round(float(found["seconds"]), 1)}
                save(name, found["nll"], reference, **more)
    held_out = blocks_of(opened, ids, 100_000, 12, work)
    for name, more_cures in {"calib --cure auto": (), "calib --cure auto,rotate-online": ("rotate-online",)}.items():
        if name in rows:
            continue
        begin = time.perf_counter()
        mine = open_model(fetch("smollm2"), device="cpu")
        options = CureOptions(cures=(*CureOptions().cures, *more_cures), target=1.0)
        cured = find_cure(
            mine, measure(mine, calibration, MeasureOptions(batch_size=4)), calibration, held_out, options
        )
        seconds = round(time.perf_counter() - begin, 1)
        prefix = cured.candidate.prefix_ids
        with QuantizedModel(mine.model, cured.plan):
            nll = score_tokens(mine.model, evaluation, prefix=prefix).nll
        same_context = score_tokens(opened.model, evaluation, prefix=prefix).nll if prefix else reference
        save(name, nll, same_context, chosen=cured.candidate.name, seconds=seconds)


if __name__ == "__main__":
    main()
