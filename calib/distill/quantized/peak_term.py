# SPDX-License-Identifier: Apache-2.0
"""`PeakTerm`: what a loss charges for values that stand out at the sites that calib measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.distill.quantized.settings import PeakControl
from calib.errors import UsageError
from calib.sites import Port, Selection, find_ports
from calib.sites.structure import is_projection

__all__ = ["PeakTerm", "kurtosis", "l4", "peak", "peak_to_mean", "weight_range"]

# what projections read, the residual stream, and in blocks also what projections write: a peak that is held down in
# some of them only comes back in the others. Logits, which nothing rounds, are written outside of blocks.
_ROUNDED = ("linear_input", "linear_output", "residual", "attention_output", "mlp_output")
_KINDS = {"peak_to_mean": _ROUNDED, "peak": _ROUNDED, "kurtosis": _ROUNDED, "l4": ("residual",)}
_TAU = 3.0
_FLOOR = 1e-12


def peak(x: Tensor) -> Tensor:
    """max|x| / rms(x) of a tensor of any shape; the gradient of the maximum is shared among equal values."""
    return x.abs().amax() / x.square().mean().clamp(min=_FLOOR).sqrt()


def peak_to_mean(x: Tensor) -> Tensor:
    """max|x| / mean|x| of a tensor of any shape: at least max|x| / rms(x), and steep where that is flat.

    A value M among n of size s has M / rms <= sqrt(n); once M >> s sqrt(n) it makes up the rms itself, and the gradient
    of ln(M / rms) by ln M falls to n s^2 / M^2. That of ln(M / mean) is n s / (n s + M): still 1/2 at M = n s.
    """
    return x.abs().amax() / x.abs().mean().clamp(min=_FLOOR)


def kurtosis(x: Tensor) -> Tensor:
    """mean(x^4) / mean(x^2)^2: 3 for normal values, 1 at least. Around 0, not the mean, as the grid is symmetric."""
    square = x.square()
    return square.square().mean() / square.mean().clamp(min=_FLOOR).square()


def l4(x: Tensor) -> Tensor:
    """mean((x / 3)^4): next to nothing for values of a normal size, and steep beyond."""
    return (x / _TAU).square().square().mean()


def weight_range(model: nn.Module) -> Tensor:
    """max|W|, mean over the weights of linear layers and convolutions."""
    maxima = [
        module.get_parameter("weight").float().abs().amax()
        for module in model.modules()
        if is_projection(module) and module._parameters.get("weight") is not None
    ]
    return torch.stack(maxima).mean()


_OF_SITE: dict[str, Callable[[Tensor], Tensor]] = {
    "peak_to_mean": peak_to_mean,
    "peak": peak,
    "kurtosis": kurtosis,
    "l4": l4,
}


class PeakTerm:
    """Watches a model in training. Inside the context, `take` gives the term over the pass since the last call.

    A tensor that several sites see counts once; what `watch` was told is padding does not count.

    Args:
        model: any module.
        control: which term, and where.

    Raises:
        UsageError: the model has no such sites, or a pattern matches nothing.
    """

    def __init__(self, model: nn.Module, control: PeakControl) -> None:
        self.model, self.control = model, control
        self.ports = [] if control.term == "range" else list(_selected(model, control))
        self._values: list[Tensor] = []
        self._seen: dict[int, Any] = {}
        self._mask: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        modules = dict(self.model.named_modules())
        for port in self.ports:
            module = modules[port.module]
            if port.port == "input":
                hook = module.register_forward_pre_hook(self._on_input, with_kwargs=True)
            else:
                hook = module.register_forward_hook(self._on_output)
            self._handles.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def watch(self, batch: Any) -> None:
        """Tells which positions of the next pass count: those of the `attention_mask` of a batch, if it has one."""
        self._forget()
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        self._mask = None if mask is None else mask.bool()

    def take(self) -> Tensor:
        """The term, a scalar with a gradient.

        Raises:
            UsageError: no site was reached.
        """
        if self.control.term == "range":
            return weight_range(self.model)
        if not self._values:
            raise UsageError(f"peak term {self.control.term}: the pass reached none of its sites; name others")
        term = torch.stack(self._values).mean()
        self._forget()
        return term

    def _forget(self) -> None:
        self._values, self._seen, self._mask = [], {}, None

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None))

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._see(output[0] if isinstance(output, tuple | list) else output)

    def _see(self, x: Any) -> None:
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.is_floating_point()) or id(x) in self._seen:
            return
        self._seen[id(x)] = x  # alive until the pass is over, so that its id stays its own
        counted = x.float()
        mask = self._mask
        if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
            counted = counted[mask.to(x.device)]
        self._values.append(_OF_SITE[self.control.term](counted))


def _selected(model: nn.Module, control: PeakControl) -> Iterable[Port]:
    ports = [port for port in find_ports(model) if port.port in ("input", "output") and port.axes != "routed"]
    if control.sites:
        selection = Selection(control.sites, ())
        selection.check(ports)
        found = [port for port in ports if selection.keeps([port.name], port.kind)]
    else:
        kinds = _KINDS[control.term]
        found = [p for p in ports if p.kind in kinds and (p.kind != "linear_output" or p.layer is not None)]
    if not found:
        raise UsageError(
            f"peak term {control.term}: {type(model).__name__} has no {' or '.join(_KINDS[control.term])}; "
            "choose another term, or name sites"
        )
    return found
