# SPDX-License-Identifier: Apache-2.0
"""The protocol written down a second time with plain hooks, knowing nothing of calib's sites or statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from calib.corpus import TokenBlocks
from calib.models import OpenedModel


@dataclass
class Naive:
    """What one hooked tensor held over all valid tokens."""

    tokens: list[torch.Tensor] = field(default_factory=list)

    @property
    def values(self) -> torch.Tensor:
        return torch.cat(self.tokens)

    @property
    def massive(self) -> int:
        magnitudes = self.values.abs()
        largest, median = magnitudes.amax(1), magnitudes.median(1).values
        return int(((largest > 100) & (largest.double() > 1000 * median.double())).sum())


def naive_protocol(opened: OpenedModel, blocks: TokenBlocks, batch_size: int) -> dict[str, Naive]:
    """Hooks of section 1.3 on a Llama: its base model is called, without logits."""
    base: Any = opened.model.model
    modules = {"embedding_output": base.embed_tokens, "final_layernorm": base.norm}
    for index, layer in enumerate(base.layers):
        modules[f"layer_{index}_hidden"] = layer
        modules[f"layer_{index}_attn_output"] = layer.self_attn
        modules[f"layer_{index}_mlp_output"] = layer.mlp
        modules[f"layer_{index}_mlp_gate"] = layer.mlp.gate_proj
    found = {name: Naive() for name in modules}
    mask = torch.ones(0, 0, dtype=torch.bool)

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[name].tokens.append(tensor.float()[mask])

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    with torch.no_grad():
        for rows in blocks.batches(batch_size):
            width = int(blocks.lengths[rows].max())
            mask = torch.arange(width) < torch.from_numpy(blocks.lengths[rows])[:, None]
            ids = torch.from_numpy(blocks.input_ids[rows, :width])
            base(input_ids=ids, attention_mask=None if mask.all() else mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found
