# SPDX-License-Identifier: Apache-2.0
"""`PaperSite`: the names that arXiv 2605.15572 gives to tensors, and which of a measurement's sites they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from calib.measurement.artifact import Measurement
from calib.measurement.site import Site

__all__ = ["MAXIMUM_KINDS", "PaperSite", "paper_sites"]

MAXIMUM_KINDS = ("embedding_output", "attn_output", "mlp_output", "hidden", "final_layernorm")
"""The five kinds whose largest magnitude is M, in the order of a forward pass."""
_KINDS = {
    "embedding": "embedding_output",
    "attention_output": "attn_output",
    "mlp_output": "mlp_output",
    "residual": "hidden",
    "final_norm": "final_layernorm",
}
_NAME = re.compile(r"(?:(?P<stack>.+)\.)?(?:layer_(?P<layer>\d+)_(?P<inner>\w+)|(?P<outer>[a-z]\w*))")


@dataclass(frozen=True)
class PaperSite:
    """One site under its published name, e.g. ``layer_16_hidden``.

    Attributes:
        kind: one of `MAXIMUM_KINDS`, or ``mlp_gate``, ``moe_gate``, ``router_logits``, which do not count for M.
        layer: of the block; None for the embedding and the final norm.
        stack: where a model has a second stack of blocks (an encoder), its module name; else empty.
    """

    kind: str
    layer: int | None = None
    stack: str = ""

    @property
    def name(self) -> str:
        """As it is in files; that of a second stack is ours, the paper has none."""
        own = self.kind if self.layer is None else f"layer_{self.layer}_{self.kind}"
        return f"{self.stack}.{own}" if self.stack else own

    @classmethod
    def parse(cls, name: str) -> PaperSite:
        """The inverse of `name`.

        Raises:
            ValueError: it is no such name.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(name)
        layer = None if found["layer"] is None else int(found["layer"])
        return cls(found["inner"] or found["outer"], layer, found["stack"] or "")

    @property
    def forward_order(self) -> tuple[str, float, int]:
        """Where a forward pass meets it: of equal magnitudes the first names M."""
        rank = MAXIMUM_KINDS.index(self.kind) if self.kind in MAXIMUM_KINDS else len(MAXIMUM_KINDS)
        outside = -1.0 if self.kind == "embedding_output" else float("inf")
        return self.stack, outside if self.layer is None else float(self.layer), rank


def paper_sites(measurement: Measurement) -> dict[PaperSite, list[Site]]:
    """The sites of a measurement by published name, in the order of a forward pass.

    Several sites share a name where one module is called several times, for hooks on it cannot tell the calls apart,
    and where a block has two attentions, of which cross-attention is in no model of the paper.
    The longest stack of blocks has the plain names; of equally long ones the last, the decoder.
    """
    found = [(*names, site) for site in measurement.sites.values() for names in _names(site)]
    hidden: dict[str, set[int]] = {}
    for kind, layer, stack, _ in found:
        if kind == "hidden" and layer is not None:
            hidden.setdefault(stack, set()).add(layer)
    main = max(reversed(list(hidden)), key=lambda stack: len(hidden[stack]), default="")
    named: dict[PaperSite, list[Site]] = {}
    for kind, layer, stack, site in found:
        inside = stack == main if layer is not None else (kind == "embedding_output" or main.startswith(stack))
        held = named.setdefault(PaperSite(kind, layer, "" if inside else stack), [])
        if site not in held:
            held.append(site)
    return {key: named[key] for key in sorted(named, key=lambda key: key.forward_order)}


def _names(site: Site) -> Iterator[tuple[str, int | None, str]]:
    """Kind, layer and stack under which the paper would see a tensor, from all of its names."""
    names = {site.name: site.kind, **site.aliases}
    for name, kind in names.items():
        module, _, port = name.partition("#")[0].partition(":")
        if port == "output" and kind in _KINDS:
            outside = kind in ("embedding", "final_norm")
            if outside:
                yield _KINDS[kind], None, module.rpartition(".")[0]
            elif site.layer is not None:
                yield _KINDS[kind], site.layer, _stack(module, site.layer)
        elif site.layer is not None and port == "output" and kind == "router":
            yield "moe_gate", site.layer, _stack(module, site.layer)
        elif site.layer is not None and module.endswith(".gate_proj") and port == "output" and "gate" in site.kinds:
            yield "mlp_gate", site.layer, _stack(module, site.layer)


def _stack(module: str, layer: int) -> str:
    """What stands before the number of the block in a module name."""
    return re.split(rf"\.{layer}(?:\.|$)", module, maxsplit=1)[0]
