# SPDX-License-Identifier: Apache-2.0
"""`cached_ranges`: of which keys and values a serving stack holds scales."""

from __future__ import annotations

from calib.errors import ModelError
from calib.export.linears import AttentionRange, attention_ranges
from calib.export.request import ExportRequest

__all__ = ["CACHED_PROJECTIONS", "cached_ranges"]

CACHED_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
"""Attention whose keys and values a serving stack caches has one of these layers.

Source: compressed-tensors 0.20, `is_cached_attention_module`; of vLLM's own names, `maybe_remap_kv_scale_name`.
"""


def cached_ranges(request: ExportRequest) -> dict[str, AttentionRange]:
    """Ranges of keys and values that readers have a place for; they drop any other scale, or do not load it at all.

    Raises:
        ModelError: there are none.
    """
    measured = attention_ranges(request.scales)
    held = {name: kv for name, kv in measured.items() if _is_held(request, name)}
    if not held:
        raise ModelError(
            f"{request.scales.model.name}: readers of this format hold no scales of keys and values for "
            f"{_kind(request, next(iter(measured)))}; "
            + ("export without --kv-cache" if request.kv_cache else "choose another format")
        )
    return held


def _kind(request: ExportRequest, attention: str) -> str:
    return attention if request.model is None else type(request.model.model.get_submodule(attention)).__name__


def _is_held(request: ExportRequest, attention: str) -> bool:
    if request.model is not None:
        from calib.export.read_compressed_tensors import has_cache

        return has_cache(request.model.model, request.model.model.get_submodule(attention))
    projections = tuple(f"{attention}.{name}:" for name in CACHED_PROJECTIONS)
    tensors = request.scales.tensors.items()
    return any(reader.startswith(projections) for name, tensor in tensors for reader in (name, *tensor.shared_with))
