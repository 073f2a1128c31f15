# SPDX-License-Identifier: Apache-2.0
"""`OnlineRotation`: rotated inputs for linear layers whose producer cannot take a rotation over.

Smoothing divides channels, and every producer that multiplies them can take that over; a rotation mixes channels, and
an elementwise product or an activation function in front of a layer lets none through. So the layer's input is rotated
when it arrives, and whoever runs the model must do that too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from calib.cures.fold import Folded
from calib.cures.input_hook import Hooked, hook_inputs, require_unchanged
from calib.cures.input_rotation import LARGEST_BLOCK, InputRotation
from calib.cures.linear import is_linear, matrix_of, own_matrix
from calib.errors import UsageError
from calib.schema.scales import CureRecord
from calib.sites import find_ports

__all__ = ["OnlineRotation", "Rotated"]


class Rotated(Hooked):
    """Rotated weights and the hooks that rotate their inputs; `revert`, or the end of a `with` block, undoes both."""

    @property
    def rotations(self) -> dict[str, InputRotation]:
        """Module -> what its input goes through."""
        changes = {name: hook.change for name, hook in self.hooks.items()}
        return {name: change for name, change in changes.items() if isinstance(change, InputRotation)}


@dataclass(frozen=True)
class OnlineRotation:
    """A rotation of the inputs of some linear layers: decided, not yet applied.

    Attributes:
        modules: names of linear layers.
        block: channels that are mixed at most, a power of two; see `InputRotation`.
        signs_seed: random signs first; none if absent.
    """

    modules: tuple[str, ...]
    block: int = LARGEST_BLOCK
    signs_seed: int | None = None

    @classmethod
    def by_role(
        cls,
        model: nn.Module,
        roles: Sequence[str] = ("mlp_output",),
        *,
        block: int = LARGEST_BLOCK,
        signs_seed: int | None = None,
    ) -> Self:
        """Of the layers that lead back to the residual stream.

        Args:
            model: any model with blocks.
            roles: kinds of their outputs: ``mlp_output`` (down_proj, whose input no weight could hold a rotation of),
                ``attention_output`` (o_proj).
            block: see the class.
            signs_seed: see the class.

        Raises:
            UsageError: no linear layer has such a role.
        """
        modules = dict(model.named_modules())
        found = [p.module for p in find_ports(model) if p.kind in roles and is_linear(modules[p.module])]
        if not found:
            raise UsageError(
                f"{', '.join(roles)}: no linear layer of {type(model).__name__} has this role; name layers"
            )
        return cls(tuple(dict.fromkeys(found)), block, signs_seed)

    def apply(self, model: nn.Module) -> Rotated:
        """Rotates the columns of the weights in place and hooks a rotation in front of the layers.

        Weights are rotated in float32 and rounded once; inputs in their own dtype. The hooks run before all that are
        registered later, so that `measure` and `QuantizedModel` see rotated inputs.

        Raises:
            UsageError: a name is of no linear layer, a width is odd, or an input is rotated already.
            ModelError: a weight is shared with another module or not in memory; the model is as it was.
        """
        by_width: dict[int, InputRotation] = {}
        rotations: dict[str, InputRotation] = {}
        weights: dict[str, torch.Tensor] = {}
        for name in self.modules:
            weight, module = own_matrix(model, name), model.get_submodule(name)
            require_unchanged(name, module)
            width = weight.shape[1]
            if width not in by_width:
                by_width[width] = InputRotation(width, self.block, self.signs_seed)
            rotations[name] = by_width[width]
            weights[f"{name}.weight"] = matrix_of(module, by_width[width].rotate(weight.float()))
        folded = Folded.write(model, weights.items(), "after rotation; load the model in a wider dtype")
        return Rotated(folded, *hook_inputs(model, rotations))

    def record(self) -> CureRecord:
        """An entry of `cures` in scales.json; a consumer can build the rotations from it."""
        return CureRecord(
            kind="rotate",
            summary=f"inputs of {len(self.modules)} layers rotated as they arrive, their weights in advance",
            needs="online-op",
            settings={
                "where": "input",
                "modules": list(self.modules),
                "matrix": "Sylvester-Hadamard / sqrt(block), on blocks of neighbouring channels",
                "largest_block": self.block,
                **({} if self.signs_seed is None else {"signs_seed": self.signs_seed}),
            },
        )
