# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's SmoothQuant in INT8, in its own environment: `INT8_SMOOTHQUANT_CFG` with one alpha."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from nll import run


def quantize(model: Any, blocks: list[list[int]], settings: dict[str, Any]) -> Any:
    import modelopt.torch.quantization as mtq

    def loop(calibrated: torch.nn.Module) -> None:
        for block in blocks:
            calibrated(input_ids=torch.tensor([block]))

    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    config["algorithm"] = {"method": "smoothquant", "alpha": settings["alpha"]}
    with torch.no_grad():
        return mtq.quantize(model, config, loop)


if __name__ == "__main__":
    run("nvidia-modelopt", sys.argv[1:], quantize)
