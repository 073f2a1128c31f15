# SPDX-License-Identifier: Apache-2.0
"""Identify a model by content: sha256 of its files, or of its tensors when it lives in memory only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from calib.models.checkpoint import Checkpoint
from calib.models.hashing import sha256_of_file
from calib.models.tasks import UNKNOWN_TASK, task_of_class
from calib.schema.provenance import ModelProvenance

__all__ = ["checkpoint_provenance", "module_provenance", "tokenizer_sha256"]


def checkpoint_provenance(
    checkpoint: Checkpoint, model: nn.Module, *, name: str, revision: str | None, task: str
) -> ModelProvenance:
    """Provenance of a model that was loaded from the files of `checkpoint`."""
    # hashlib releases the GIL, so shards are read side by side.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256_of_file, [*checkpoint.weight_files, *checkpoint.tokenizer_files]))
    weights = dict(zip([p.name for p in checkpoint.weight_files], digests, strict=False))
    return ModelProvenance(
        name=name,
        revision=revision,
        architecture=type(model).__name__,
        model_type=checkpoint.model_type,
        task=task,
        dtype=_dtype(model),
        parameters=sum(p.numel() for p in model.parameters()),
        source_format=checkpoint.source_format,
        config_sha256=sha256_of_file(checkpoint.folder / "config.json"),
        tokenizer_sha256=_tokenizer_sha256(checkpoint.tokenizer_files, digests[len(weights) :]),
        weights_sha256=dict(sorted(weights.items())),
    )


def module_provenance(module: nn.Module, name: str) -> ModelProvenance:
    """Provenance of a model in memory: the hash covers name, dtype, shape and bytes of every tensor of its state.

    Args:
        module: any module; its tensors may lie on any device.
        name: how to call it in reports.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = getattr(module, "config", None)
    return ModelProvenance(
        name=name,
        architecture=type(module).__name__,
        model_type=str(getattr(config, "model_type", "module")),
        task=task_of_class(type(module)) or UNKNOWN_TASK,
        dtype=_dtype(module),
        parameters=sum(p.numel() for p in module.parameters()),
        source_format="memory",
        config_sha256=hashlib.sha256(_description(module, config).encode()).hexdigest(),
        weights_sha256={"state_dict": digest.hexdigest()},
    )


def tokenizer_sha256(paths: Sequence[Path]) -> str | None:
    """Hash of the files of a tokenizer, as `ModelProvenance` has it; None if there are none."""
    return _tokenizer_sha256(paths, [sha256_of_file(path) for path in paths])


def _description(module: nn.Module, config: object) -> str:
    """The configuration, or the printed structure of a module that has none."""
    if not hasattr(config, "to_dict"):
        return repr(module)
    # These say where and by which version the object was made, not what it computes.
    fields = {k: v for k, v in config.to_dict().items() if k not in {"_name_or_path", "transformers_version"}}
    return json.dumps(fields, sort_keys=True, default=str)


def _dtype(module: nn.Module) -> str:
    """The dtype that most parameters have (norms are often kept in float32)."""
    sizes: Counter[str] = Counter()
    for parameter in module.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else "none"


def _tokenizer_sha256(paths: Iterable[Path], digests: list[str]) -> str | None:
    """Hash of the single tokenizer file, or over the lines `name=sha256` of several."""
    if len(digests) <= 1:
        return digests[0] if digests else None
    lines = "\n".join(f"{path.name}={digest}" for path, digest in zip(paths, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
