# SPDX-License-Identifier: Apache-2.0
"""SGLang's JSON of key and value scales (`--quantization-param-path`): one FP8 scale per layer for both.

Rank -> layer -> scale = max(keys, values) / 448. SGLang checks the dtype, the number of ranks and that every layer is
there; on any error it logs and takes 1.0. vLLM had the same file and has removed it. Source: SGLang
0.5, `model_loader/weight_utils.py` (`kv_cache_scales_loader`, `QuantParamSchema`).
"""

from __future__ import annotations

import json
import re

import numpy as np

from calib.errors import ModelError
from calib.export.cached import cached_ranges
from calib.export.formats import register
from calib.export.request import ExportRequest, ExportSummary
from calib.scales.float8 import FLOAT8_MAX

__all__ = ["FILE", "export_sglang_kv"]

FILE = "kv_cache_scales.json"


@register(
    "sglang-kv",
    summary="FP8 scales of keys and values, one per layer",
    carries="key and value scales",
    consumers=("SGLang",),
    proven="its schema",
)
def export_sglang_kv(request: ExportRequest) -> ExportSummary:
    """Writes `kv_cache_scales.json` for one tensor-parallel rank; a per-tensor scale holds for any number of them.

    Raises:
        ModelError: keys and values were not measured in every layer, or no reader holds scales of them.
    """
    ranges = cached_ranges(request)
    scales: dict[int, float] = {}
    for module, found in ranges.items():
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", module)
        if not numbers:
            raise ModelError(f"{module}: its name has no number of a layer, which SGLang asks for")
        layer = int(numbers[-1])
        if layer in scales:
            raise ModelError(f"{module}: is a second attention of layer {layer}, and SGLang's file has one per layer")
        scales[layer] = float(np.float32(max(found.key, found.value)) / np.float32(FLOAT8_MAX))
    missing = sorted(set(range(max(scales) + 1)) - set(scales))
    if missing:
        raise ModelError(f"layer {missing[0]}: has no scales of keys and values, and SGLang asks for every layer")
    content = {
        "model_type": request.scales.model.model_type,
        "kv_cache": {
            "dtype": "float8_e4m3fn",
            "scaling_factor": {"0": {str(layer): scales[layer] for layer in sorted(scales)}},
        },
    }
    (request.folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return ExportSummary(list(ranges), {}, list(ranges), ["keys and values share the larger of their scales"])
