# SPDX-License-Identifier: Apache-2.0
"""Every layout comes to ``[blocks, tokens, channels]`` with its values in place."""

from __future__ import annotations

import pytest
import torch

from calib.sites.layout import to_blocks
from calib.sites.port import Axes


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "axes", "batch", "expected", "aligned"),
    [
        ((2, 5, 8), "tokens", (2, 5), (2, 5, 8), True),
        ((2, 5, 4, 2), "tokens", (2, 5), (2, 5, 8), True),
        ((10, 8), "tokens", (2, 5), (2, 5, 8), True),
        ((2, 4, 5, 3), "heads", (2, 5), (2, 5, 12), True),
        ((2, 1, 5, 8), "tokens", (2, 5), (2, 5, 8), True),
        ((2, 3, 4, 8), "tokens", (2, 5), (2, 12, 8), False),
        ((2, 8), "tokens", (2, 5), (2, 1, 8), False),
        ((7, 8), "tokens", (2, 5), (7, 1, 8), False),
        ((2, 9, 8), "tokens", (2, 5), (2, 9, 8), False),
        ((2, 5, 8), "tokens", None, (2, 5, 8), False),
        ((3, 8), "tokens", None, (3, 1, 8), False),
        ((8,), "tokens", None, (1, 1, 8), False),
        ((2, 3, 4, 5), "channels_first", None, (2, 20, 3), False),
        ((2, 3, 6), "channels_first", (2, 6), (2, 6, 3), False),
        ((2, 3, 4, 5, 6), "channels_first", None, (2, 120, 3), False),
    ],
)
def test_shapes(
    shape: tuple[int, ...], axes: Axes, batch: tuple[int, int] | None, expected: tuple[int, ...], aligned: bool
) -> None:
    tensor = numbered(*shape)
    view, same_axes = to_blocks(tensor, axes, batch)
    assert view.shape == expected
    assert same_axes is aligned
    assert torch.equal(view.flatten().sort().values, tensor.flatten())


def test_heads_are_side_by_side_in_a_token() -> None:
    tensor = numbered(2, 4, 5, 3)
    view, _ = to_blocks(tensor, "heads", (2, 5))
    assert torch.equal(view[1, 3], torch.cat([tensor[1, head, 3] for head in range(4)]))


def test_channels_first_becomes_channels_last() -> None:
    tensor = numbered(2, 3, 4, 5)
    view, _ = to_blocks(tensor, "channels_first", None)
    assert torch.equal(view[1, 2 * 5 + 3], tensor[1, :, 2, 3])


def test_a_query_as_attention_gets_it_is_not_copied() -> None:
    projected = numbered(2, 5, 12)
    query = projected.view(2, 5, 4, 3).transpose(1, 2)
    view, _ = to_blocks(query, "heads", (2, 5))
    assert view.data_ptr() == projected.data_ptr()
    assert torch.equal(view, projected)
