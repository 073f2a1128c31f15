# SPDX-License-Identifier: Apache-2.0
"""A small text transformer with fresh weights, whose attention may do without a sink."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from calib.distill.networks.attention import ATTENTIONS, AttentionForm, EncoderLayer
from calib.errors import UsageError

__all__ = ["TEXT_NETWORKS", "TextTransformer", "make_text_network"]


class TextTransformer(nn.Module):
    """Token and position embeddings, pre-norm encoder layers, the mean over tokens, a linear head.

    Args:
        width: of a token's vector.
        depth: encoder layers.
        heads: attention heads.
        classes: outputs.
        vocabulary: tokens.
        length: most tokens of a text.
        attention: see `SelfAttention`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        vocabulary: int,
        length: int,
        attention: AttentionForm = "softmax",
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits `[n, classes]`; padding counts nowhere.

        Args:
            input_ids: int64 `[n, t]`.
            attention_mask: `[n, t]`, 1 where there is a token.
            token_type_ids: of tokenizers that give them; a text has one type only.
        """
        x = self.tokens(input_ids) + self.positions[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, attention_mask.bool())
        weights = attention_mask.to(x)[:, :, None]
        mean = (self.norm(x) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return self.head(mean)  # type: ignore[no-any-return]


def _make(
    width: int, depth: int, heads: int, form: AttentionForm, classes: int, vocabulary: int, length: int
) -> nn.Module:
    return TextTransformer(width, depth, heads, classes, vocabulary, length, form)


TEXT_NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    name + ("" if form == "softmax" else f"_{form}"): partial(_make, *size, form)
    for name, size in (("text_micro", (64, 2, 4)), ("text_tiny", (128, 4, 4)))
    for form in ATTENTIONS
}
"""Name -> factory(classes, vocabulary, length)."""


def make_text_network(name: str, classes: int, *, vocabulary: int, length: int) -> nn.Module:
    """A text classifier with fresh weights from torch's global generator.

    Args:
        name: one of `TEXT_NETWORKS`.
        classes: outputs.
        vocabulary: tokens of the tokenizer.
        length: most tokens of a text.

    Raises:
        UsageError: an unknown name.
    """
    if name not in TEXT_NETWORKS:
        raise UsageError(f"network {name!r}: unknown for texts; choose one of {', '.join(sorted(TEXT_NETWORKS))}")
    return TEXT_NETWORKS[name](classes, vocabulary, length)
