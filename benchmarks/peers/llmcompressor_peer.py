# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's SmoothQuant, then static INT8, in its own environment.

Two calls with the pipeline `basic`: in one recipe, the ranges would be those of the model before smoothing. The mapping
is its own for Llama (norms), with that of up_proj to down_proj added on request: its documentation does not have it.
"""

from __future__ import annotations

import sys
from typing import Any

from nll import run

_NORMS = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
]
_MLP = [[["re:.*down_proj"], "re:.*up_proj"]]


def quantize(model: Any, blocks: list[list[int]], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    grid = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    scheme = {
        "targets": ["Linear"],
        "weights": {**grid, "strategy": "channel", "observer": "memoryless_minmax"},
        "input_activations": {**grid, "strategy": "tensor", "observer": "static_minmax"},
    }
    mappings = [*_NORMS, *_MLP] if settings["down_proj"] else _NORMS
    data = Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]})
    for recipe in (
        SmoothQuantModifier(smoothing_strength=settings["alpha"], mappings=mappings),
        QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    ):
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            pipeline="basic",
            num_calibration_samples=len(blocks),
            max_seq_length=len(blocks[0]),
            shuffle_calibration_samples=False,
        )
    return model.eval()


if __name__ == "__main__":
    run("llmcompressor", sys.argv[1:], quantize)
