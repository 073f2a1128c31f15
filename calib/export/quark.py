# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's checkpoint format, INT8 W8A8 static: the numbers of compressed-tensors under another configuration.

vLLM reads it (`quantization/quark/quark.py`, QuarkW8A8Int8) in bfloat16 or float16 and runs the same kernel. Weight
scales have shape ``[out]``, input scales ``[1]``; keys and values are scales of the outputs of their projections, which
the format has for FP8 only, so they are not written.
"""

from __future__ import annotations

from typing import Any

import torch

from calib.errors import UsageError
from calib.export.checkpoint import copy_companions, read_config, save_weights, write_config
from calib.export.compressed_tensors import weight_codes
from calib.export.formats import register
from calib.export.linears import linear_ranges
from calib.export.request import ExportRequest, ExportSummary

__all__ = ["export_quark", "quark_config"]


@register(
    "quark",
    summary="AMD Quark checkpoint, INT8 W8A8 static",
    carries="weights, input scales (symmetric), what stays in float",
    consumers=("vLLM (bfloat16, float16)",),
    proven="its schema",
    model=True,
)
def export_quark(request: ExportRequest) -> ExportSummary:
    """Writes weights, configuration and tokenizer.

    Raises:
        UsageError: the scales are not 8-bit and symmetric.
        ModelError: no linear layer has a scale.
    """
    opened = request.opened
    if request.scales.bits != 8:
        raise UsageError(f"quark: --bits {request.scales.bits} has no checkpoint format here; only 8 has")
    linears = linear_ranges(request.scales, opened.model)
    uneven = [name for name, found in linears.ranges.items() if not found.symmetric]
    if uneven:
        raise UsageError(f"quark: {uneven[0]} has a zero point, which it does not take; choose scales with --symmetric")
    state = {name: tensor.detach().cpu() for name, tensor in opened.model.state_dict().items()}
    for name, found in linears.ranges.items():
        codes, scale = weight_codes(state[f"{name}.weight"])
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = codes, scale.reshape(-1)
        state[f"{name}.input_scale"] = torch.tensor([found.symmetric_scale(127.5)], dtype=torch.float32)
    save_weights(state, request.folder, request.shard_size)
    config = read_config(opened)
    config["quantization_config"] = quark_config(sorted(linears.in_float))
    write_config(config, request.folder)
    copy_companions(opened, request.folder)
    notes = list(linears.notes)
    if opened.provenance.dtype == "float32":
        notes.append("vLLM reads Quark checkpoints in bfloat16 or float16 only; this one is float32")
    return ExportSummary(list(linears.ranges), linears.in_float, [], notes)


def quark_config(exclude: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    tensor = {"dtype": "int8", "symmetric": True, "is_dynamic": False, "round_method": "half_even", "group_size": None}
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {
            "weight": {**tensor, "qscheme": "per_channel", "ch_axis": 0},
            "input_tensors": {**tensor, "qscheme": "per_tensor", "ch_axis": None},
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": exclude,
        "algo_config": None,
    }
