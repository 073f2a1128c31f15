# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with fresh weights: the configuration of a checkpoint, changed, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from calib.errors import UsageError
from calib.models.quiet import quiet_transformers
from calib.models.source import locate
from calib.models.tokens import load_processor, load_tokenizer

__all__ = ["FreshModel", "fresh_model"]

_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}


@dataclass(frozen=True)
class FreshModel:
    """A model that knows nothing yet, float32 on the CPU, and what belongs to it."""

    model: nn.Module
    tokenizer: Any | None
    processor: Any | None
    task: str
    folder: Path


def fresh_model(
    reference: str, changes: Mapping[str, Any], task: str, class_names: tuple[str, ...] | None = None
) -> FreshModel:
    """Weights come from torch's global generator; those of the checkpoint are not read.

    Args:
        reference: hub id or folder of a checkpoint.
        changes: entries of its configuration -> other values, e.g. `num_hidden_layers`.
        task: as optimum calls it.
        class_names: of a classifier, in the order of its outputs.

    Raises:
        UsageError: the configuration has no such entry, or no model can be made of it.
        ModelError: the checkpoint is not there.
    """
    import transformers

    folder = locate(reference).folder
    named: dict[str, Any] = {}
    if class_names is not None:
        named = {"id2label": dict(enumerate(class_names)), "label2id": {name: n for n, name in enumerate(class_names)}}
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            unknown = [name for name in changes if not hasattr(config, name)]
            if unknown:
                raise UsageError(f"fresh: {unknown[0]}: {reference} has no such entry; see its config.json")
            config = type(config).from_dict(_changed(config, changes) | named)
            model = getattr(transformers, _CLASSES[task]).from_config(config)
        except UsageError:
            raise
        except Exception as error:  # any configuration and any model class raises what it likes
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"fresh: no model can be made of {reference} ({why}); change fresh") from error
        tokenizer = load_tokenizer(folder, reference)
        processor = load_processor(folder, reference)
    return FreshModel(model.float(), tokenizer, processor, task, folder)


def _changed(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, with those that follow from others which change."""
    entries: dict[str, Any] = config.to_dict()
    canonical = {getattr(config, "attribute_map", {}).get(name, name): value for name, value in changes.items()}
    width, heads = entries.get("hidden_size") or 0, entries.get("num_attention_heads") or 1
    follows = entries.get("head_dim") == width // heads
    types, layers = entries.get("layer_types"), canonical.get("num_hidden_layers")
    if types and layers is not None:  # a pattern, repeated
        entries["layer_types"] = (types * -(-layers // len(types)))[:layers]
    entries |= canonical
    if follows and "head_dim" not in canonical:
        entries["head_dim"] = entries["hidden_size"] // entries["num_attention_heads"]
    return entries
