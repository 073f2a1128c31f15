# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt's checkpoint format, FP8 static: `hf_quant_config.json`, mirrored in `config.json`.

One scale per weight and per input, float32 scalars, amax / 448. Layers that TensorRT-LLM fuses get one scale, the
largest; ModelOpt 0.47 leaves that to the reader. All else equals what it writes itself (`make test-consumers`). It
writes scales of keys and values of at least 1.0; here they are what was measured. Source: Model-Optimizer,
`modelopt/torch/export/quant_utils.py` (`get_scaling_factor`).
"""

from __future__ import annotations

import json
from typing import Any

import torch

from calib import __version__
from calib.export.cached import cached_ranges
from calib.export.checkpoint import copy_companions, read_config, save_weights, write_config
from calib.export.formats import register
from calib.export.linears import FUSED, linear_ranges
from calib.export.request import ExportRequest, ExportSummary
from calib.quantized.fake_quantize import round_float8
from calib.scales.float8 import FLOAT8_MAX

__all__ = ["FILE", "export_modelopt"]

FILE = "hf_quant_config.json"


@register(
    "modelopt",
    summary="ModelOpt checkpoint, FP8 static",
    carries="weights, input scales, key and value scales, what stays in float",
    consumers=("TensorRT-LLM", "vLLM (GPU)", "SGLang"),
    proven="what ModelOpt itself writes",
    variants=("fp8",),
    model=True,
)
def export_modelopt(request: ExportRequest) -> ExportSummary:
    """Writes weights, both configurations and the tokenizer.

    Raises:
        ModelError: no linear layer has a scale, or no attention has scales of keys and values.
    """
    opened = request.opened
    linears = linear_ranges(request.scales, opened.model)
    attention = cached_ranges(request) if request.kv_cache else {}
    state = {name: tensor.detach().cpu() for name, tensor in opened.model.state_dict().items()}
    largest = {name: float(state[f"{name}.weight"].float().abs().max()) for name in linears.ranges}
    for name, found in linears.ranges.items():
        parent, _, part = name.rpartition(".")
        group = next((g for g in FUSED if part in g), (part,))
        amax = max(largest.get(f"{parent}.{other}" if parent else other, 0.0) for other in group)
        scale = torch.tensor(amax or FLOAT8_MAX, dtype=torch.float32) / FLOAT8_MAX
        codes = round_float8(state[f"{name}.weight"].float() / scale)
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = codes, scale
        state[f"{name}.input_scale"] = torch.tensor(found.symmetric_scale(FLOAT8_MAX), dtype=torch.float32)
    for name, kv in attention.items():
        state[f"{name}.k_proj.k_scale"] = torch.tensor(kv.key / FLOAT8_MAX, dtype=torch.float32)
        state[f"{name}.v_proj.v_scale"] = torch.tensor(kv.value / FLOAT8_MAX, dtype=torch.float32)
    save_weights(state, request.folder, request.shard_size)
    exclude = sorted(linears.in_float)
    producer = {"name": "calib", "version": __version__}
    kv_algorithm = "FP8" if attention else None
    settings: dict[str, Any] = {"quant_algo": "FP8", "kv_cache_quant_algo": kv_algorithm, "exclude_modules": exclude}
    content = json.dumps({"producer": producer, "quantization": settings}, indent=2)
    (request.folder / FILE).write_text(content + "\n", encoding="utf-8")
    config = read_config(opened)
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": producer,
        "ignore": exclude,
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if attention else {}),
    }
    write_config(config, request.folder)
    copy_companions(opened, request.folder)
    return ExportSummary(list(linears.ranges), linears.in_float, list(attention), list(linears.notes))
