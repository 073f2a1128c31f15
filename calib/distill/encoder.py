# SPDX-License-Identifier: Apache-2.0
"""A text encoder with a fresh head: mean of the last hidden states, one linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calib.errors import UsageError

__all__ = ["EncoderClassifier", "shortened"]


class EncoderClassifier(nn.Module):
    """Logits `[n, C]` of padded token ids.

    Args:
        encoder: a transformers model with `last_hidden_state` `[n, t, d]`.
        classes: outputs.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.config = config
        self.classifier = nn.Linear(int(config.hidden_size), classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Padding counts nowhere.

        Args:
            input_ids: int64 `[n, t]`.
            attention_mask: `[n, t]`, 1 where there is a token.
            inputs: what else the encoder takes.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        weights = attention_mask.to(hidden)[:, :, None]
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def shortened(encoder: nn.Module, layers: int) -> nn.Module:
    """The encoder with only the first layers of its longest module list, in place.

    Raises:
        UsageError: it has no list of layers, or fewer.
    """
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    name, longest = max(lists, key=lambda pair: len(pair[1]), default=("", nn.ModuleList()))
    if layers > len(longest):
        raise UsageError(f"layers {layers}: {type(encoder).__name__} has {len(longest)}; ask for fewer")
    parent = encoder.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(list(longest)[:layers]))
    config: Any = encoder.config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return encoder
