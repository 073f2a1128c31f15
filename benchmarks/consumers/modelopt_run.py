# SPDX-License-Identifier: Apache-2.0
"""Runs in ModelOpt's own environment: it calibrates and writes its own FP8 checkpoint; imports nothing of calib.

`python modelopt_run.py MODEL TOKENS.json OUT`: FP8 static of MODEL on blocks of token ids, keys and values included, by
ModelOpt's own maximum calibration. ModelOpt has no reader of such checkpoints, so what it writes is what ours must be.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch


def main() -> None:
    source, tokens, out = sys.argv[1:4]
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    blocks = json.loads(Path(tokens).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def loop(calibrated: torch.nn.Module) -> None:
        for block in blocks:
            calibrated(input_ids=torch.tensor([block]))

    with torch.no_grad():
        mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), loop)
        export_hf_checkpoint(model, export_dir=out)


if __name__ == "__main__":
    main()
