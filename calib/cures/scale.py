# SPDX-License-Identifier: Apache-2.0
"""`OnlineScaling`: loud channels brought down in front of linear layers whose producer cannot take the factors over.

SmoothQuant folds the factors of a tensor into whatever makes it. Where that also feeds something else (in a post-norm
encoder the residual stream) or a non-linear function lies between, they are multiplied when the input arrives, and
whoever runs the model must do that too: ``(x f) (W / f)^T = x W^T``. As an operation that is one product per value, so
only what sets the range is touched: channels above a quantile of all channels' largest magnitudes come down to it. The
weights then hold few columns that are larger than before, and error compensation has all the others to make good what
these cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib.cures.fold import Folded
from calib.cures.input_hook import Hooked, hook_inputs, require_unchanged
from calib.cures.input_scaling import InputScaling
from calib.cures.linear import columns_of, is_linear, matrix_of, other_holder, own_matrix
from calib.errors import ArtifactError, ModelError, UsageError
from calib.measurement.artifact import Measurement
from calib.schema.scales import CureRecord, ScaleFile
from calib.statistics.observation import REST

__all__ = ["QUANTILE", "OnlineScaling", "channel_factors", "recorded_factors"]

QUANTILE = 0.9
"""Of channels that stay as they are; benchmarks/quality_others.py has what it does to MiniLM."""
LEAST_FACTOR = 1e-4
"""A float16 weight below 6 cannot overflow when it is divided by this; see `smooth.LARGEST_SCALE`."""


@dataclass(frozen=True, eq=False)
class OnlineScaling:
    """Factors for the inputs of some linear layers: decided, not yet applied.

    Attributes:
        factors: layer -> what its input is multiplied by, float32 ``[inputs]``, values of bfloat16 above 0. Layers that
            read one tensor have equal ones, and share the product.
    """

    factors: Mapping[str, NDArray[np.float32]]

    @classmethod
    def find(
        cls,
        model: nn.Module,
        measurement: Measurement,
        modules: Iterable[str],
        *,
        quantile: float = QUANTILE,
        include_sink: bool = True,
    ) -> Self:
        """Factors from the channels of a measurement. Layers that read one tensor in any call get the same.

        Left out: tensors without a channel above the quantile, and layers whose weight another module holds too.

        Args:
            model: the one that was measured.
            measurement: with channel statistics of the linear inputs.
            modules: the layers to look at.
            quantile: see the module.
            include_sink: whether the first positions of a block count.

        Raises:
            UsageError: the quantile is not between 0 and 1.
            ArtifactError: the measurement lacks an input, or its channels.
        """
        if not 0 < quantile < 1:
            raise UsageError(f"quantile {quantile}: not between 0 and 1; 0.9 leaves nine of ten channels as they are")
        wanted = set(modules)
        chosen = [
            name
            for name, module in model.named_modules()
            if name in wanted and is_linear(module) and other_holder(model, module) is None
        ]
        amax = _amax(measurement, {*chosen}, include_sink=include_sink)
        for name in chosen:
            if name not in amax:
                raise ArtifactError(f"{name}: the measurement has no input of it; measure linear_input sites")
        found = {name: channel_factors(amax[name], quantile) for name in chosen}
        return cls({name: factors for name, factors in found.items() if (factors != 1).any()})

    @classmethod
    def of(cls, model: nn.Module, record: CureRecord) -> Self:
        """The scaling that a record describes.

        Raises:
            ArtifactError: the record is damaged, or of another model.
        """
        modules = dict(model.named_modules())
        factors = {}
        for name, loud in _recorded(record).items():
            module = modules.get(name)
            width = columns_of(module) if module is not None and is_linear(module) else 0
            if not all(channel.isdecimal() and int(channel) < width for channel in loud):
                raise ArtifactError(
                    f"cure scale: {name}: the factors do not fit this model; pass the one that was cured"
                )
            factors[name] = np.ones(width, np.float32)
            factors[name][[int(channel) for channel in loud]] = [*loud.values()]
        return cls(factors)

    def apply(self, model: nn.Module) -> Hooked:
        """Divides the columns of the weights in place and hooks the factors in front of the layers.

        Weights are divided in float32 and rounded once. The hooks run before all that are registered later, so that
        `measure` and `QuantizedModel` see scaled inputs.

        Raises:
            UsageError: a name is of no linear layer, a factor cannot be one, or an input is scaled or rotated already.
            ModelError: a weight is of another size, shared with another module, or not in memory; the model is as it
                was.
        """
        shared: dict[bytes, InputScaling] = {}
        changes: dict[str, InputScaling] = {}
        weights: dict[str, torch.Tensor] = {}
        for name, values in self.factors.items():
            weight, module, factors = own_matrix(model, name), model.get_submodule(name), torch.from_numpy(values)
            require_unchanged(name, module)
            if weight.shape[1] != factors.numel():
                raise ModelError(f"{name}: has {weight.shape[1]} inputs here, not {factors.numel()}; measure anew")
            changes[name] = shared.setdefault(values.tobytes(), InputScaling(factors))
            weights[f"{name}.weight"] = matrix_of(module, weight.float() / factors.to(weight.device))
        folded = Folded.write(model, weights.items(), "after scaling; load the model in a wider dtype")
        return Hooked(folded, *hook_inputs(model, changes))

    def record(self) -> CureRecord:
        """An entry of `cures` in scales.json, with every factor: a consumer can build the products from it."""
        loud = {
            name: {str(channel): float(values[channel]) for channel in np.flatnonzero(values != 1)}
            for name, values in self.factors.items()
        }
        share = sum(map(len, loud.values())) / max(sum(values.size for values in self.factors.values()), 1)
        return CureRecord(
            kind="scale",
            summary=f"inputs of {len(loud)} layers multiplied as they arrive, {share:.1%} of their channels; "
            "the weights of these divided",
            needs="online-op",
            settings={"where": "input", "factors": loud},
        )


def channel_factors(amax: NDArray[np.floating[Any]], quantile: float = QUANTILE) -> NDArray[np.float32]:
    """Factors that bring loud channels down to a quantile of all: ``min(1, cap / amax)``.

    Args:
        amax: largest magnitude of each channel, ``[channels]``.
        quantile: see the module.

    Returns:
        float32 ``[channels]``, values of bfloat16 from `LEAST_FACTOR` to 1.
    """
    wide = amax.astype(np.float64)
    cap = np.quantile(wide, quantile)
    loud = wide > cap
    factors = np.where(loud, np.maximum(cap / np.where(loud, wide, 1.0), LEAST_FACTOR), 1.0)
    rounded: NDArray[np.float32] = torch.from_numpy(factors).bfloat16().float().numpy()
    return rounded


def recorded_factors(scales: ScaleFile) -> dict[str, dict[str, float]]:
    """Layer -> channel of its input, as digits -> what that is multiplied by; all others by 1.

    Raises:
        ArtifactError: a record is damaged.
    """
    return {name: loud for cure in scales.cures if cure.kind == "scale" for name, loud in _recorded(cure).items()}


def _recorded(record: CureRecord) -> dict[str, dict[str, float]]:
    held = record.settings.get("factors")
    if not isinstance(held, dict) or record.settings.get("where") != "input":
        raise ArtifactError("cure scale: its record holds no factors of inputs; quantize again")
    return {name: loud for name, loud in held.items() if isinstance(loud, dict)}


def _amax(measurement: Measurement, modules: set[str], *, include_sink: bool) -> Mapping[str, NDArray[np.float32]]:
    """Largest magnitude of each channel of what a layer reads; one array for layers that share a tensor in any call."""
    found: dict[str, NDArray[np.float32]] = {}
    for site in measurement.sites.values():
        ports = [name.partition("#")[0] for name in (site.name, *site.aliases)]
        readers = [p.removesuffix(":input") for p in ports if p.endswith(":input") and p[: -len(":input")] in modules]
        if not readers:
            continue
        channels = site.statistics.channels
        if channels is None:
            raise ArtifactError(f"{site.name}: was measured without channels; measure with full statistics")
        amax = (channels if include_sink else channels.of(REST)).amax
        known = {id(found[name]): found[name] for name in readers if name in found}
        merged = np.maximum.reduce([amax, *known.values()])
        for name in {*readers, *(n for n, held in found.items() if id(held) in known)}:
            found[name] = merged
    return found
