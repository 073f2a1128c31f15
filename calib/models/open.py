# SPDX-License-Identifier: Apache-2.0
"""Open a model for measurement: find it, check it, load it, say exactly what it was."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError, UsageError
from calib.models.checkpoint import Checkpoint, read_checkpoint, read_headers
from calib.models.checks import check_code, check_finite, check_missing, check_sizes, check_vocabulary
from calib.models.device import choose_device
from calib.models.memory import check_memory
from calib.models.packed import is_packed, unpacked_state
from calib.models.provenance import checkpoint_provenance
from calib.models.quiet import quiet_transformers
from calib.models.reason import reason
from calib.models.source import locate
from calib.models.tasks import check_task, choose_class, choose_task
from calib.models.tokens import load_processor, load_tokenizer
from calib.models.transforms import apply_online_transforms
from calib.schema.provenance import ModelProvenance

__all__ = ["OpenedModel", "open_model"]

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class OpenedModel:
    """A model that is ready to run, with everything that belongs to it."""

    model: nn.Module
    tokenizer: Any | None
    processor: Any | None
    task: str
    provenance: ModelProvenance
    folder: Path

    def cured(self, records: Sequence[str]) -> OpenedModel:
        """The same model after its weights were changed: identified by its parent and by what was done.

        Args:
            records: of the changes, in order.
        """
        parent = self.provenance.fingerprint
        digest = hashlib.sha256("\n".join([parent, *records]).encode()).hexdigest()
        provenance = self.provenance.model_copy(update={"weights_sha256": {"cured": digest}, "parent": parent})
        return replace(self, provenance=provenance)


def open_model(
    reference: str | Path,
    *,
    revision: str | None = None,
    task: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> OpenedModel:
    """Open a model in evaluation mode.

    Args:
        reference: hub id, folder of a checkpoint, `.gguf` file, or a folder with exactly one `.gguf` file.
        revision: branch, tag or commit of a hub id.
        task: task name of optimum's `TasksManager`; None lets the hub or the architecture decide.
        dtype: `auto` (what the checkpoint says), `float32`, `bfloat16` or `float16`.
        device: `auto` (cuda if there is one), `cpu`, `cuda`, `cuda:1`, or `balanced` over all GPUs.
        trust_remote_code: run Python files that the checkpoint brings.

    Raises:
        UsageError: an unknown task, dtype or device, or a revision of local files.
        ModelError: the model is missing, damaged, does not fit into memory, needs code that is not trusted, has
            weights that are NaN or infinite or missing, or a tokenizer that does not belong to it.
    """
    target_dtype, target_device = _dtype(dtype), choose_device(device)
    task = None if task is None else check_task(task)
    name = str(reference)
    source = locate(name, revision=revision, with_code=trust_remote_code)
    checkpoint = read_checkpoint(source.folder, name)
    check_code(checkpoint, name, trust_remote_code=trust_remote_code)
    headers = read_headers(checkpoint, name)
    check_memory(checkpoint, headers, target_dtype, target_device, name)
    with quiet_transformers():
        task = task or choose_task(checkpoint, name, hub_id=source.hub_id, revision=source.revision)
        cls = choose_class(checkpoint, name, task, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(source.folder, name, trust_remote_code=trust_remote_code)
        processor = load_processor(source.folder, name, trust_remote_code=trust_remote_code)
        model = _load(cls, checkpoint, name, target_dtype, target_device, trust_remote_code=trust_remote_code)
    if is_packed(checkpoint):
        method = checkpoint.config["quantization_config"]["quant_method"]
        checkpoint = replace(checkpoint, source_format=f"{checkpoint.source_format}:{method}")
    check_vocabulary(tokenizer, model, name)
    check_finite(model, name)
    if tokenizer is None:
        checkpoint = replace(checkpoint, tokenizer_files=())
    provenance = checkpoint_provenance(checkpoint, model, name=source.name, revision=source.revision, task=task)
    return OpenedModel(model, tokenizer, processor, task, provenance, source.folder)


def _dtype(dtype: str) -> torch.dtype | None:
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: not supported; choose auto, float32, bfloat16 or float16")
    return DTYPES[dtype]


def _load(
    cls: Any, checkpoint: Checkpoint, name: str, dtype: torch.dtype | None, device: str, *, trust_remote_code: bool
) -> nn.Module:
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "output_loading_info": True}
    if is_packed(checkpoint):
        options |= {"state_dict": unpacked_state(checkpoint, name), "config": _plain_config(checkpoint)}
    if trust_remote_code:
        options["trust_remote_code"] = True
    if (checkpoint.config.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        from transformers import Mxfp4Config

        # its kernels for GPUs compute all experts in one call, in which none can be seen
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if not checkpoint.config.get("quantization_config"):
        options["ignore_mismatched_sizes"] = True  # else the names and sizes are only in a printed report
    if device != "cpu":
        options["device_map"] = device if device == "balanced" else {"": device}
    model, missing = _from_pretrained(cls, checkpoint, name, options)
    if missing and all(key.startswith("pooler.") for key in missing) and _takes(type(model), "add_pooling_layer"):
        # An encoder cut out of a model with another head: the pooler was never trained, so it is left out.
        model, missing = _from_pretrained(type(model), checkpoint, name, options | {"add_pooling_layer": False})
    check_missing(missing, model, name)
    settings = (checkpoint.config.get("quantization_config") or {}).get("transform_config")
    apply_online_transforms(model, settings, checkpoint.tensor, name)
    return model.eval()


def _from_pretrained(
    cls: Any, checkpoint: Checkpoint, name: str, options: dict[str, Any]
) -> tuple[nn.Module, set[str]]:
    try:
        # compressed-tensors draws progress bars that no setting turns off
        with contextlib.redirect_stderr(io.StringIO()):
            model, info = cls.from_pretrained(None if "state_dict" in options else checkpoint.folder, **options)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"model {name}: out of memory while loading ({reason(error)}); pass --dtype bfloat16 or another --device"
        ) from error
    except Exception as error:
        # Any exception of any model class and its code ends here; the chain keeps it for `-v -v`.
        method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
        if method:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"model {name}: its {method} weights cannot be loaded here ({why}); install what is missing, or pass "
                "the checkpoint before quantization"
            ) from error
        raise ModelError(f"model {name}: {cls.__name__} cannot load it ({reason(error)}); check its files") from error
    check_sizes(info["mismatched_keys"], model, name)
    return model, set(info["missing_keys"])


def _plain_config(checkpoint: Checkpoint) -> Any:
    """The configuration of weights that are multiplied out."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder)
    del config.quantization_config
    return config


def _takes(cls: type, parameter: str) -> bool:
    return parameter in inspect.signature(cls).parameters
