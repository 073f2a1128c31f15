# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from calib.distill.networks.attention import EncoderLayer, SelfAttention
from calib.errors import UsageError


def test_plain_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mine, theirs = SelfAttention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in (mine.query, mine.key, mine.value)]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (mine.query, mine.key, mine.value)]))
        theirs.out_proj.load_state_dict(mine.output.state_dict())
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    expected = theirs(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
    assert torch.allclose(mine(x, mask)[mask], expected[mask], atol=1e-6)


def test_clipped_softmax_gives_exact_zeros_and_ones() -> None:
    """Where one key wins by far its weight is exactly 1, that of the others exactly 0, at finite logits."""
    attention = SelfAttention(4, 1, "clipped")
    with torch.no_grad():
        for layer in (attention.query, attention.key, attention.value, attention.output):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    x = 8 * torch.eye(4)[None]
    assert torch.equal(attention(x), x)
    plain = SelfAttention(4, 1)
    plain.load_state_dict(attention.state_dict())
    assert not torch.equal(plain(x / 4), x / 4)
    short = torch.tensor([[True, True, False, False]])
    assert torch.equal(attention(x, short)[:, 2:, 2:], torch.zeros(1, 2, 2))


@pytest.mark.parametrize("form", ["clipped", "gated"])
def test_a_head_can_add_nothing(form: str) -> None:
    """What a softmax cannot: attend to nothing at finite values."""
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, form)  # type: ignore[arg-type]
    with torch.no_grad():
        attention.output.bias.zero_()
        if attention.gate is not None:
            attention.gate.weight.zero_()
            attention.gate.bias.fill_(-200.0)
        else:
            attention.value.bias.zero_()
            attention.query.weight.zero_()
            attention.query.bias.zero_()
    x = torch.randn(1, 4, 8)
    limit = 0.0 if form == "gated" else 0.1  # even attention of 4 keys is clipped to a sixteenth each
    assert float(attention(x).detach().abs().max()) <= limit * float(attention.value(x).detach().abs().max())


def test_every_weight_of_a_layer_can_be_quantized() -> None:
    from calib.quantized import plan_from_scales

    plan = plan_from_scales(EncoderLayer(8, 2, "gated"), inputs="none")
    assert set(plan.weights) == {
        *(f"attention.{part}" for part in ("query", "key", "value", "output", "gate")),
        "linear1",
        "linear2",
    }
    assert not plan.left_out


def test_impossible_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="softmax, clipped, gated"):
        SelfAttention(8, 2, "other")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 heads"):
        SelfAttention(8, 3)
