# SPDX-License-Identifier: Apache-2.0
"""Which ports see the same tensor. Worked out in the first forward pass and frozen; what fires later is traced later.

Two ports see one tensor if they see the same elements of the same storage in the same state: equal storage, offset,
shape, strides and version. A storage is known by its Python object, which lives as long as the storage itself and is
referred to weakly, so that no activation is held: memory is reused within one forward pass, and an address alone would
take strangers for one tensor. The version counts in-place writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from calib.kernels import Accumulator
from calib.sites.port import KINDS, Port

__all__ = ["Group", "Tracer"]

Call = tuple[int, int]
"""A port by its number, and how many times it had fired before in the same forward pass."""


@dataclass
class Group:
    """One tensor, and all ports that see it."""

    members: list[Call]
    accumulator: Accumulator | None
    dtype: str
    channels: int
    heads: int | None = None

    def named(self, ports: list[Port], calls: dict[int, int]) -> tuple[str, str, dict[str, str]]:
        """Canonical name, kind, and aliases with their kinds; the own name is among them if its own kind is another.

        Args:
            ports: all ports, by number.
            calls: how often each port fires in one forward pass.
        """
        members = sorted(self.members, key=lambda m: (ports[m[0]].sort_key, m[1], KINDS.index(ports[m[0]].kind)))
        kinds: dict[str, list[Port]] = {}
        for number, call in members:
            name = ports[number].name + (f"#{call}" if calls[number] > 1 else "")
            kinds.setdefault(name, []).append(ports[number])

        def kind_of(held: list[Port]) -> str:
            strong = [p.kind for p in held if not p.weak] or [p.kind for p in held]
            return min(strong, key=KINDS.index)

        kind = kind_of([ports[number] for number, _ in members])
        under = {name: kind_of(held) for name, held in kinds.items()}
        name = next(iter(under))
        return name, kind, {other: of for other, of in under.items() if other != name or of != kind}


@dataclass
class Tracer:
    """The groups of one forward pass, in the order of their first sight.

    Attributes:
        groups: all of them in the first pass; later those that were not known before.
        first: whether nothing is known yet.
    """

    first: bool = True
    groups: list[Group] = field(default_factory=list)
    _known: dict[Hashable, tuple[weakref.ref[torch.UntypedStorage], Group]] = field(default_factory=dict)

    def find(self, call: Call, raw: torch.Tensor, view: torch.Tensor, known: Group | None = None) -> tuple[Group, bool]:
        """The group of a tensor, and whether it is new.

        Args:
            call: who sees it.
            raw: the tensor as the module has it.
            view: the same in the layout ``[blocks, tokens, channels]``; a copy if strides did not allow a view.
            known: its group, if an earlier pass found it.
        """
        storage = raw.untyped_storage()
        seen = view if view.untyped_storage() is storage else raw
        version = 0 if seen.is_inference() else seen._version
        key = (storage.data_ptr(), seen.storage_offset(), tuple(seen.shape), seen.stride(), version)
        if key in self._known:
            alive, group = self._known[key]
            if alive() is storage and known is None:
                group.members.append(call)
                return group, False
        if known is not None:
            self._known[key] = (weakref.ref(storage), known)
            return known, False
        group = Group([call], None, str(raw.dtype).removeprefix("torch."), view.shape[-1])
        self._known[key] = (weakref.ref(storage), group)
        self.groups.append(group)
        return group, True
