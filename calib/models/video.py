# SPDX-License-Identifier: Apache-2.0
"""A processor without its video half, which needs torchvision: pictures and text do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calib.errors import ModelError

__all__ = ["processor_without_video"]

_PLACES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def processor_without_video(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The processor of a checkpoint (Qwen2-VL and its kin), put together from its other parts.

    Args:
        folder: of the checkpoint.
        trust_remote_code: handed on to the parts.

    Raises:
        ModelError: the folder names no processor class of transformers that has a part for videos.
    """
    import transformers

    cls = getattr(transformers, _class_name(folder), None)
    parts = cls.get_attributes() if cls is not None and hasattr(cls, "get_attributes") else []
    if cls is None or "video_processor" not in parts:
        raise ModelError(f"{folder.name}: names no processor with a part for videos; pass another model")

    def accept(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else cls.check_argument_for_proper_class(self, name, argument)

    without = type(cls.__name__, (cls,), {"check_argument_for_proper_class": accept})
    loaders = {
        "tokenizer": transformers.AutoTokenizer,
        "image_processor": transformers.AutoImageProcessor,
        "feature_extractor": transformers.AutoFeatureExtractor,
    }
    loaded = [
        None
        if part == "video_processor"
        else loaders[part].from_pretrained(folder, trust_remote_code=trust_remote_code)
        for part in parts
    ]
    settings, _ = cls.get_processor_dict(folder)
    return without.from_args_and_dict(loaded, settings)  # type: ignore[attr-defined]


def _class_name(folder: Path) -> str:
    for place in _PLACES:
        file = folder / place
        if file.is_file():
            named = json.loads(file.read_text(encoding="utf-8")).get("processor_class")
            if named:
                return str(named)
    return ""
