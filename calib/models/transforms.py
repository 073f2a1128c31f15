# SPDX-License-Identifier: Apache-2.0
"""Transforms that a compressed-tensors checkpoint has computed as the model runs (`transform_config`).

Weights are stored as they are behind a rotation; the inputs or outputs of their layers are rotated at run time. vLLM
reads that; transformers up to 5.23 ignores it, loads, and computes another function. So it is applied here, by the code
of compressed-tensors itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError

__all__ = ["apply_online_transforms", "online_transforms"]

_PLACES = ("input", "output")


def online_transforms(settings: Mapping[str, Any] | None, name: str) -> Any | None:
    """What is left to compute of a `transform_config`, as compressed-tensors' `TransformConfig`.

    Transforms of weights are in the stored weights already.

    Args:
        settings: of ``quantization_config``; None if the checkpoint has none.
        name: of the model, for messages.

    Returns:
        None if nothing is left.

    Raises:
        ModelError: it is malformed, or transforms queries or keys, which is not read here.
    """
    if not settings:
        return None
    from compressed_tensors.transform import TransformConfig

    try:
        config = TransformConfig.model_validate(dict(settings))
    except ValueError as error:
        raise ModelError(
            f"model {name}: its transform_config cannot be read ({str(error).splitlines()[0]}); update "
            "compressed-tensors, or pass the checkpoint before quantization"
        ) from error
    for scheme in config.config_groups.values():
        scheme.apply = [one for one in scheme.apply if one.is_online()]
        others = sorted({str(one.location) for one in scheme.apply} - set(_PLACES))
        if others:
            raise ModelError(
                f"model {name}: its transform_config transforms {', '.join(others)}, which is not read here; pass the "
                "checkpoint before quantization"
            )
    config.config_groups = {key: scheme for key, scheme in config.config_groups.items() if scheme.apply}
    return config if config.config_groups else None


def apply_online_transforms(
    model: nn.Module, settings: Mapping[str, Any] | None, stored: Callable[[str], torch.Tensor | None], name: str
) -> None:
    """Hooks the transforms of a checkpoint onto its loaded model, unless whoever loaded it has done so.

    Args:
        model: as transformers loaded it.
        settings: see `online_transforms`.
        stored: tensor of the checkpoint by name, None if it holds none: matrices that were drawn or trained.
        name: of the model, for messages.

    Raises:
        ModelError: see `online_transforms`; or a matrix is missing or of another shape, or a width does not fit.
    """
    config = online_transforms(settings, name)
    if config is None:
        return
    from compressed_tensors.transform import TransformBase, TransformFactory

    if any(isinstance(module, TransformBase) for module in model.modules()):
        return
    try:
        for group, scheme in config.config_groups.items():
            TransformFactory.from_scheme(scheme, name=group).apply_to_model(model, use_tqdm=False)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"model {name}: its transform_config does not fit the model ({error}); fetch it again"
        ) from error
    placed = {path: module for path, module in model.named_modules() if isinstance(module, TransformBase)}
    filled: set[int] = set()
    for path, transform in placed.items():
        for key, parameter in transform.named_parameters():
            held = stored(f"{path}.{key}")
            if held is not None:
                if held.shape != parameter.shape:
                    raise ModelError(f"model {name}: {path}.{key} has shape {list(held.shape)}; fetch it again")
                parameter.data.copy_(held)
                filled.add(id(parameter))  # layers of one width share it, and files may hold it once
    for path, transform in placed.items():
        for key, parameter in transform.named_parameters():
            fixed = key == "weight" and transform.scheme.type == "hadamard"
            if not fixed and id(parameter) not in filled:
                raise ModelError(f"model {name}: {path}.{key} is missing; fetch it again")
        parent, _, child = path.rpartition(".")
        delattr(model.get_submodule(parent), child)  # its hook holds it; it is no layer of the model
