# SPDX-License-Identifier: Apache-2.0
"""`InputHook`: an operation on what a module reads, computed as it arrives; `Hooked`: a model that has some."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import nn

from calib.errors import UsageError

if TYPE_CHECKING:
    from calib.cures.fold import Folded

__all__ = ["Hooked", "InputChange", "InputHook", "change_of", "hook_inputs", "require_unchanged"]


class InputChange(Protocol):
    """What is done to an input. Modules that read one tensor and share one of these also get one changed tensor.

    Attributes:
        done: what it is called, in the past: the input "is scaled".
    """

    done: str

    def change_once(self, x: torch.Tensor) -> torch.Tensor:
        """The changed tensor, or the last result if that is of this very tensor."""
        ...

    def forget(self) -> None:
        """Lets go of the last result."""
        ...


class InputHook:
    """A forward pre-hook that changes the first tensor a module is called with.

    Attributes:
        change: shared by the modules that read one tensor.
        fired: whether it was called.
    """

    def __init__(self, change: InputChange) -> None:
        self.change = change
        self.fired = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with the first tensor changed."""
        self.fired = True
        if args:
            return (self.change.change_once(args[0]), *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, name: self.change.change_once(kwargs[name])}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied module changes alike; what is remembered belongs to tensors, not to modules


class Hooked:
    """Changed weights and the hooks that change their inputs; `revert`, or the end of a `with` block, undoes both.

    Attributes:
        names: the parameters that were changed.
        hooks: by module.
    """

    def __init__(self, folded: Folded, hooks: Mapping[str, InputHook], handles: ExitStack) -> None:
        self._folded, self._handles = folded, handles
        self.names, self.hooks = folded.names, dict(hooks)

    def silent(self) -> list[str]:
        """Modules that no forward pass has called: whatever uses their weight in another way is wrong now."""
        return [name for name, hook in self.hooks.items() if not hook.fired]

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


def hook_inputs(model: nn.Module, changes: Mapping[str, InputChange]) -> tuple[dict[str, InputHook], ExitStack]:
    """Hooks a change in front of each module; the hooks run before all that are registered later.

    Returns:
        The hooks by module, and what takes them away when it is closed.
    """
    hooks, handles = {}, ExitStack()
    for name, change in changes.items():
        hooks[name] = InputHook(change)
        module = model.get_submodule(name)
        handles.callback(change.forget)
        handles.callback(module.register_forward_pre_hook(hooks[name], prepend=True, with_kwargs=True).remove)
    return hooks, handles


def require_unchanged(name: str, module: nn.Module) -> None:
    """Refuses a module whose input is changed already.

    Raises:
        UsageError: it is.
    """
    change = change_of(module)
    if change is not None:
        raise UsageError(f"{name}: its input is {change.done} already; revert that first")


def change_of(module: nn.Module) -> InputChange | None:
    """The change of a module's input, if there is one."""
    hooks = module._forward_pre_hooks.values()
    return next((hook.change for hook in hooks if isinstance(hook, InputHook)), None)
