# SPDX-License-Identifier: Apache-2.0
"""Watches, beside a calibration, the largest and the median magnitude of each token at the sites of a protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.measurement import Calibration
from calib.sites.layout import to_blocks
from calib.statistics import Observation, TokenRatio

__all__ = ["massive_tokens"]

KINDS = ("embedding", "residual", "attention_output", "mlp_output", "final_norm")


@contextmanager
def massive_tokens(calibration: Calibration) -> Iterator[None]:
    """Within the block, outputs of the five kinds also feed `TokenRatio`; its end hands the result to the calibration.

    For `measure(..., around=massive_tokens)`. Padding is left out, as everywhere. Numbers stay on their device during
    a forward pass and are read once after it.
    """
    modules = dict(calibration.model.named_modules())
    watch = _Watch(calibration)
    handles = [
        modules[port.module].register_forward_hook(watch.hook(number))
        for number, port in enumerate(calibration.ports)
        if port.port == "output" and port.kind in KINDS
    ]
    try:
        yield
        watch.flush()
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """What was seen of the forward pass that runs, and all before it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.context: Observation | None = None
        self.pending: list[tuple[tuple[int, int], torch.Tensor]] = []
        self.calls: Counter[int] = Counter()
        self.failed = calibration.failed_forwards

    def hook(self, number: int) -> Callable[..., None]:
        port = self.calibration.ports[number]

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple | list):
                output = output[port.index] if port.index < len(output) else None
            context = self.calibration.context
            if context is None or not isinstance(output, torch.Tensor) or not output.is_floating_point():
                return
            if context is not self.context:
                self.flush()
                self.context = context
            call = self.calls[number]
            self.calls[number] += 1
            blocks, tokens = context.group.shape
            view, aligned = to_blocks(output, port.axes, (blocks, tokens))
            if aligned:
                self.pending.append(((number, call), _largest_and_median(view)))

        return see

    def flush(self) -> None:
        """Reads what a forward pass left on the device, in one transfer, and adds it unless the pass broke off."""
        held = self.calibration.token_ratios
        broke_off = self.calibration.failed_forwards > self.failed
        self.failed = self.calibration.failed_forwards
        if self.context is not None and self.pending and not broke_off:
            numbers = torch.stack([pair for _, pair in self.pending]).cpu().numpy()
            for (key, _), (amax, median) in zip(self.pending, numbers, strict=True):
                one = TokenRatio.of(amax, median, self.context)
                held[key] = held[key].merge(one) if key in held else one
        self.pending.clear()
        self.calls.clear()


def _largest_and_median(values: torch.Tensor) -> torch.Tensor:
    """float32 ``[2, blocks, tokens]`` of ``[blocks, tokens, channels]``; the lower of two middle values.

    A selection by numpy takes a fifth of the time of `torch.median` on a CPU, for 16-bit floats as integers: without
    their sign these order alike.
    """
    middle = (values.shape[-1] - 1) // 2
    if values.device.type != "cpu":
        magnitudes = values.float().abs()
        return torch.stack([magnitudes.amax(-1), magnitudes.median(-1).values])
    if values.element_size() == 2:
        bits = (values.contiguous().view(torch.int16) & 0x7FFF).numpy()
        pair = np.stack([bits.max(-1), np.partition(bits, middle, axis=-1)[..., middle]])
        return torch.from_numpy(pair).view(values.dtype).float()
    magnitudes = values.float().abs()
    median = np.partition(magnitudes.numpy(), middle, axis=-1)[..., middle]
    return torch.stack([magnitudes.amax(-1), torch.from_numpy(np.ascontiguousarray(median))])
