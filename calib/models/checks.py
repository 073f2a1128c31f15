# SPDX-License-Identifier: Apache-2.0
"""Conditions that an opened model must meet before anything is measured on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError
from calib.models.checkpoint import Checkpoint

__all__ = ["check_code", "check_finite", "check_missing", "check_sizes", "check_token_ids", "check_vocabulary"]

logger = logging.getLogger(__name__)


def check_code(checkpoint: Checkpoint, name: str, *, trust_remote_code: bool) -> None:
    """A model type that transformers does not know runs only with the code it brings, and only when trusted.

    Raises:
        ModelError: naming the files to read before `--trust-remote-code`.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, auto_map = checkpoint.model_type, checkpoint.config.get("auto_map") or {}
    if model_type in CONFIG_MAPPING or (auto_map and trust_remote_code):
        return
    if auto_map:
        # "modeling_x.XForCausalLM" or, from another repository, "owner/name--modeling_x.XForCausalLM"
        modules = {str(target).rsplit(".", 1)[0] for target in auto_map.values()}
        files = ", ".join(sorted(f"{module.replace('--', ': ')}.py" for module in modules))
        raise ModelError(f"model {name}: needs the Python code it brings ({files}); read it, then --trust-remote-code")
    if not model_type:
        raise ModelError(f"model {name}: config.json has no model_type; pass the folder of a transformers checkpoint")
    raise ModelError(
        f"model {name}: transformers {transformers.__version__} does not know model_type {model_type!r}; "
        "update transformers or pass another model"
    )


def check_sizes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], model: nn.Module, name: str) -> None:
    """Every weight must have the size that the configuration gives: transformers fills others with random numbers.

    Args:
        mismatched: name, size in the checkpoint, size in the model.
        model: that was loaded.
        name: of the checkpoint.

    Raises:
        ModelError: naming the first of them.
    """
    wrong = sorted((key, list(held), list(wanted)) for key, held, wanted in mismatched)
    if wrong:
        key, held, wanted = wrong[0]
        more = f" (and {len(wrong) - 1} more weights)" if len(wrong) > 1 else ""
        raise ModelError(
            f"model {name}: {type(model).__name__} cannot load it: {key} has shape {held}, and {wanted} by "
            f"config.json{more}; fetch the files of one checkpoint"
        )


def check_missing(missing: Iterable[str], model: nn.Module, name: str) -> None:
    """Every weight must come from the checkpoint: transformers fills the others with random numbers.

    Raises:
        ModelError: naming the class and the first missing tensors.
    """
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(
            f"model {name}: {len(names)} weights of {type(model).__name__} are not in the checkpoint ({shown}) and "
            "would be random numbers; pass the --task it was saved for"
        )


def check_finite(model: nn.Module, name: str) -> None:
    """No weight is NaN or infinite. One pass over the weights, one synchronisation per device.

    Raises:
        ModelError: naming the first such tensor and how many of its values are not finite.
    """
    tensors = {key: tensor.detach() for key, tensor in _floating_weights(model)}
    verdicts: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        verdicts.setdefault(tensor.device, []).append(_is_finite(tensor))
    if all(bool(torch.stack(flags).all()) for flags in verdicts.values()):
        return
    bad = {key: _nonfinite_count(tensor) for key, tensor in tensors.items()}
    bad = {key: count for key, count in bad.items() if count}
    first, count = next(iter(bad.items()))
    others = f" (and {len(bad) - 1} other tensors)" if len(bad) > 1 else ""
    raise ModelError(
        f"model {name}: {count} of {tensors[first].numel()} values of {first} are NaN or infinite{others}; "
        "the checkpoint is damaged, fetch it again"
    )


def check_vocabulary(tokenizer: Any, model: nn.Module, name: str) -> None:
    """The tokenizer's vocabulary fits into the embedding; tokens added on top of it are only warned about.

    Raises:
        ModelError: naming both sizes.
    """
    rows = _embedding_rows(model)
    if rows is None or tokenizer is None:
        return
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"model {name}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {rows} rows; "
            "use the tokenizer that belongs to this model"
        )
    if len(tokenizer) > rows:
        # Published checkpoints do this (an image token in a text-only model): fatal only if such a token is used.
        logger.warning("%s: %d added tokens have no row in the embedding (%d)", name, len(tokenizer) - rows, rows)


def check_token_ids(input_ids: torch.Tensor, model: nn.Module) -> None:
    """Every token id has a row in the embedding.

    Args:
        input_ids: integer tensor of any shape, on the CPU.
        model: the model that will read it.

    Raises:
        ModelError: naming the id and the number of rows.
    """
    rows = _embedding_rows(model)
    if rows is None or input_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= rows:
        raise ModelError(
            f"token id {low if low < 0 else high}: the embedding has {rows} rows; "
            "use the tokenizer that belongs to this model"
        )


def _embedding_rows(model: nn.Module) -> int | None:
    reader = getattr(model, "get_input_embeddings", None)
    try:
        embedding = reader() if reader is not None else None
    except NotImplementedError:
        return None
    return int(embedding.num_embeddings) if isinstance(embedding, nn.Embedding) else None


def _floating_weights(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters, and the running statistics of batch norms; masks and other constants may hold infinities."""
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            yield key, parameter
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")) and not buffer.is_meta:
            yield key, buffer


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A boolean scalar on the device of the tensor; extremes carry NaN along and cost one read, no temporary."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return low.isfinite() & high.isfinite()


def _nonfinite_count(tensor: torch.Tensor) -> int:
    return int((~tensor.float().isfinite()).sum())
