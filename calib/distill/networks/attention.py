# SPDX-License-Identifier: Apache-2.0
"""Self-attention for students trained from scratch: plain, or in a form that needs no attention sink."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from calib.errors import UsageError

__all__ = ["ATTENTIONS", "AttentionForm", "EncoderLayer", "SelfAttention"]

AttentionForm = Literal["softmax", "clipped", "gated"]
ATTENTIONS: tuple[AttentionForm, ...] = ("softmax", "clipped", "gated")

_STRETCH = 1.0


class SelfAttention(nn.Module):
    """Multi-head self-attention over `[n, t, width]`.

    A head that has nothing to add must still spread a softmax of sum 1 over something; networks learn to park it on a
    few positions with huge values. Two forms allow a head to add nothing (Bondarenko et al. 2023, arXiv 2306.12929):

    * ``clipped``: clip((1 - g) softmax + g, 0, 1) with g = -1 / t. The paper has g = -a / t with a of 2 to 4; with
      a > 1 even attention is clipped to nothing, where no gradient leads out, so that a is 1 here: what gets less than
      about its even share gets nothing.
    * ``gated``: the output of each head times sigmoid(linear(x)), as also in Qiu et al. 2025 (arXiv 2505.06708).

    Args:
        width: of a token, a multiple of `heads`.
        heads: attention heads.
        form: softmax, clipped or gated.

    Raises:
        UsageError: an unknown form, or a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, form: AttentionForm = "softmax") -> None:
        super().__init__()
        if form not in ATTENTIONS:
            raise UsageError(f"attention {form!r}: unknown; choose {', '.join(ATTENTIONS)}")
        if width % heads:
            raise UsageError(f"attention: {heads} heads do not divide a width of {width}; choose a divisor")
        self.heads, self.form = heads, form
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.gate = nn.Linear(width, heads) if form == "gated" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: `[n, t, width]`.
            mask: bool `[n, t]`, False where there is padding.
        """
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        allowed = None if mask is None else mask[:, None, None, :]
        if self.form == "clipped":
            heads = _clipped_softmax(query, key, allowed) @ value
        else:
            heads = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        if self.gate is not None:
            heads = heads * torch.sigmoid(self.gate(x)).transpose(1, 2)[..., None]
        return self.output(heads.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer of plain linear layers, so that all of them can be quantized.

    `nn.TransformerEncoderLayer` multiplies by the weights of its attention without calling a module, and in evaluation
    mode by all of them: nothing of it can be measured or quantized.

    Args:
        width: of a token.
        heads: attention heads.
        form: see `SelfAttention`.
    """

    def __init__(self, width: int, heads: int, form: AttentionForm = "softmax") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, form)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[n, t, width]` to the same; `mask` as for `SelfAttention`."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.linear2(self.activation(self.linear1(self.norm2(x))))  # type: ignore[no-any-return]


def _clipped_softmax(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if allowed is None:
        tokens = logits.new_tensor(float(key.shape[2]))
    else:
        logits = logits.masked_fill(~allowed, -torch.inf)
        tokens = allowed.sum(3, keepdim=True).to(logits)
    low = -_STRETCH / tokens
    stretched: Tensor = (1 - low) * torch.softmax(logits, dim=-1) + low
    return stretched.clamp(0, 1)
