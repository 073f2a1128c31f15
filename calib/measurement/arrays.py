# SPDX-License-Identifier: Apache-2.0
"""Packs the arrays of many sites in few tensors, and unpacks them again.

A file with one tensor per site and field would hold ten thousand small ones and a header as large as some of them.
Here each field is one tensor, its sites one after the other, with the offsets beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calib.errors import ArtifactError

__all__ = ["pack", "unpack"]

Tensors = dict[str, NDArray[np.generic]]


def pack(prefix: str, items: Sequence[Tensors]) -> Tensors:
    """Joins the fields of all items; a field that an item lacks takes no room there.

    Counts are stored in the smallest unsigned type that holds all of them. Shapes are not kept: readers know them.
    """
    packed: Tensors = {}
    for name in sorted({name for item in items for name in item}):
        parts = [np.ravel(item[name]) if name in item else None for item in items]
        sizes = [-1 if part is None else part.size for part in parts]
        present = [part for part in parts if part is not None]
        joined = np.concatenate(present) if present else np.zeros(0, np.uint8)
        packed[f"{prefix}/{name}"] = _narrow(joined)
        packed[f"{prefix}/{name}/sizes"] = np.array(sizes, np.int64)
    return packed


def unpack(prefix: str, tensors: Tensors, count: int) -> list[Tensors]:
    """The inverse of `pack`, as flat arrays.

    Raises:
        ArtifactError: sizes do not fit the arrays.
    """
    items: list[Tensors] = [{} for _ in range(count)]
    for key, sizes in tensors.items():
        if not (key.startswith(f"{prefix}/") and key.endswith("/sizes")):
            continue
        name = key.removeprefix(f"{prefix}/").removesuffix("/sizes")
        joined = tensors.get(f"{prefix}/{name}")
        lengths = [int(n) for n in sizes]
        if joined is None or len(lengths) != count or sum(max(n, 0) for n in lengths) != joined.size:
            raise ArtifactError(f"measurement.safetensors: field {prefix}/{name} does not fit its sizes; measure again")
        start = 0
        for item, length in zip(items, lengths, strict=True):
            if length >= 0:
                item[name] = joined[start : start + length]
                start += length
    return items


def _narrow(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Integers in the smallest unsigned type that holds them; deterministic, it depends on the values only."""
    if array.dtype != np.int64 or not array.size or array.min() < 0:
        return array
    largest = int(array.max())
    for dtype in (np.uint8, np.uint16, np.uint32):
        if largest <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array
