# SPDX-License-Identifier: Apache-2.0
"""`OnlineRotation`: rotated inputs for linear layers whose producer cannot take a rotation over.

Smoothing divides channels, and every producer that multiplies them can take that over; a rotation mixes channels, and
an elementwise product or an activation function in front of a layer lets none through. So the layer's input is rotated
when it arrives, and whoever runs the model must do that too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import nn

from calib.cures.fold import Folded
from calib.cures.input_rotation import LARGEST_BLOCK, InputRotation, RotationHook, rotation_of
from calib.cures.linear import is_linear, matrix_of
from calib.errors import ModelError, UsageError
from calib.schema.scales import CureRecord
from calib.sites import find_ports

__all__ = ["OnlineRotation", "Rotated"]


class Rotated:
    """Rotated weights and the hooks that rotate their inputs; `revert`, or the end of a `with` block, undoes both.

    Attributes:
        names: the parameters that were changed.
        rotations: module -> what its input goes through.
    """

    def __init__(self, folded: Folded, hooks: dict[str, RotationHook], handles: ExitStack) -> None:
        self._folded, self._hooks, self._handles = folded, hooks, handles
        self.names = folded.names
        self.rotations = {name: hook.rotation for name, hook in hooks.items()}

    def silent(self) -> list[str]:
        """Modules that no forward pass has called: whatever uses their weight in another way is wrong now."""
        return [name for name, hook in self._hooks.items() if not hook.fired]

    def revert(self) -> None:
        """Puts the very bits back and takes the hooks away; a second call does nothing.

        Raises:
            ModelError: a weight was changed by something else meanwhile; nothing is reverted.
        """
        self._folded.revert()
        self._handles.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folded.__exit__(kind, error, trace)
        self._handles.close()


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
        rotations: dict[int, InputRotation] = {}
        hooks: dict[str, RotationHook] = {}
        weights: dict[str, torch.Tensor] = {}
        modules = dict(model.named_modules())
        for name in self.modules:
            own = _weight(model, modules, name)
            weight = matrix_of(modules[name], own)
            width = weight.shape[1]
            if width not in rotations:
                rotations[width] = InputRotation(width, self.block, self.signs_seed)
            hooks[name] = RotationHook(rotations[width])
            weights[f"{name}.weight"] = matrix_of(modules[name], rotations[width].rotate(weight.float()))
        folded = Folded.write(model, weights.items(), "after rotation; load the model in a wider dtype")
        handles = ExitStack()
        for rotation in rotations.values():
            handles.callback(rotation.forget)
        for name, hook in hooks.items():
            handles.callback(modules[name].register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        return Rotated(folded, hooks, handles)

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


def _weight(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> torch.Tensor:
    """The weight of a linear layer whose input can be rotated."""
    module = modules.get(name)
    if module is None or not is_linear(module):
        kind = "no module" if module is None else f"a {type(module).__name__}, no linear layer,"
        raise UsageError(f"{name}: is {kind} of {type(model).__name__}; name linear layers")
    if rotation_of(module) is not None:
        raise UsageError(f"{name}: its input is rotated already; revert that first")
    weight = module.get_parameter("weight")
    if weight.is_meta:
        raise ModelError(f"{name}: its weight is not in memory; load the model without offloading")
    for other, held in modules.items():
        if held is not module and any(p is weight for p in held._parameters.values()):
            raise ModelError(f"{name}: its weight is tied to {other}, whose input is not rotated; leave this layer out")
    return weight.detach()
