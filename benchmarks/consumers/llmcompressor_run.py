# SPDX-License-Identifier: Apache-2.0
"""Runs in llm-compressor's own environment; imports nothing of calib.

`python llmcompressor_run.py calibrate MODEL TOKENS.json OUT`: static W8A8 of MODEL on blocks of token ids, by
llm-compressor's own min-max observer, written as a checkpoint.
`python llmcompressor_run.py read CHECKPOINT TOKENS.json OUT.npz`: logits of a checkpoint as it loads there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    task, source, tokens, out = sys.argv[1:5]
    blocks = json.loads(Path(tokens).read_text(encoding="utf-8"))
    (calibrate if task == "calibrate" else read)(source, blocks, out)


def calibrate(source: str, blocks: list[list[int]], out: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    grid = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    scheme = {
        "targets": ["Linear"],
        "weights": {**grid, "strategy": "channel", "observer": "memoryless_minmax"},
        "input_activations": {**grid, "strategy": "tensor", "observer": "static_minmax"},
    }
    data = Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]})
    oneshot(
        model=model,
        dataset=data,
        recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(blocks),
        max_seq_length=len(blocks[0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)


def read(source: str, blocks: list[list[int]], out: str) -> None:
    import numpy as np
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        np.savez(out, logits=model(input_ids=torch.tensor(blocks)).logits.numpy())


if __name__ == "__main__":
    main()
