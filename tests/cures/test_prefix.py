# SPDX-License-Identifier: Apache-2.0
"""A prefix needs positions of its own, and a model may have no more than its blocks fill."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.corpus import build_blocks
from calib.cures.prefix import find_prefixes, room_for_prefix
from calib.models import open_model


@pytest.mark.parametrize(("length", "room"), [(500, 2), (510, 2), (511, 1), (512, 0)])
def test_positions_that_the_blocks_leave_are_counted(tiny_gpt2: Path, length: int, room: int) -> None:
    opened = open_model(tiny_gpt2, device="cpu")  # learned 512 positions
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=1, max_length=length)
    assert room_for_prefix(opened, blocks, 2) == room
    found = find_prefixes(opened, blocks, candidates=[5, 9])
    assert all(len(prefix.token_ids) <= room for prefix in found)


def test_rotary_positions_go_on(tiny_llama: Path) -> None:
    opened = open_model(tiny_llama, device="cpu")
    declared = opened.model.config.max_position_embeddings
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=1, max_length=declared)
    assert room_for_prefix(opened, blocks, 2) == 2
