# SPDX-License-Identifier: Apache-2.0
"""The prefix that a scale file asks for: tokens in front of every sequence, computed in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from calib.errors import ArtifactError, UsageError
from calib.schema.scales import ScaleFile

__all__ = ["prefix_of", "require_in_vocabulary"]


def prefix_of(scales: ScaleFile, *, online: bool = False) -> tuple[int, ...]:
    """Token ids that stand in front of every sequence; empty if the scale file has no such cure.

    Args:
        scales: with cures.
        online: the model computes whatever a cure asks for as it runs.

    Raises:
        UsageError: a cure needs an operation that the model does not compute.
        ArtifactError: the record of a prefix holds no token ids.
    """
    prefix: tuple[int, ...] = ()
    for cure in scales.cures:
        if cure.needs == "online-op" and not online:
            raise UsageError(
                f"cure {cure.kind}: computes as the model runs, which no checkpoint holds; restore the cures first"
            )
        if cure.kind == "prefix":
            ids = cure.settings.get("token_ids")
            if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
                raise ArtifactError(f"cure prefix: token_ids {ids!r} are no token ids; write the scale file again")
            prefix = tuple(int(i) for i in ids)
    return prefix


def require_in_vocabulary(model: nn.Module, prefix: Sequence[int]) -> None:
    """Refuses token ids that the model has no embedding for.

    Raises:
        ArtifactError: there is one.
    """
    if prefix:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        size = embedding.weight.shape[0]
        outside = [token for token in prefix if not 0 <= token < size]
        if outside:
            raise ArtifactError(
                f"cure prefix: token {outside[0]} is outside of the vocabulary of {size}; write the scale file again"
            )
