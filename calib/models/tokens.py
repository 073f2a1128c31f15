# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the processor that lie beside the weights, where there are any that work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from calib.errors import ModelError
from calib.models.checkpoint import TOKENIZER_FILES
from calib.models.reason import reason
from calib.models.video import processor_without_video

__all__ = ["load_processor", "load_tokenizer", "processor_fault"]

logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer of a checkpoint; None when it has none that works (token ids can still be measured).

    Raises:
        ModelError: the tokenizer needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in ("tokenizer.json", *TOKENIZER_FILES)):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # A tokenizer class may raise anything; the model itself is still of use.
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {name}: its tokenizer needs the Python code it brings; read it, then --trust-remote-code"
            ) from error
        hint = ""
        if not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model")):
            # transformers blames tiktoken, its last resort, when these are what is missing.
            hint = "; a SentencePiece file needs pip install calib[sentencepiece]"
        why = f"{type(error).__name__}: {reason(error)}{hint}"
        logger.warning("%s: no tokenizer, only token ids can be measured: %s", name, why)
        return None
    expected = sorted(set(getattr(tokenizer, "vocab_files_names", {}).values()))
    if expected and not any((folder / file).is_file() for file in expected):
        # transformers then builds an empty vocabulary and turns every text into unknown tokens, silently.
        logger.warning(
            "%s: no tokenizer, only token ids can be measured: %s needs %s",
            name,
            type(tokenizer).__name__,
            " or ".join(expected),
        )
        return None
    return tokenizer


def load_processor(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any | None:
    """The processor of a checkpoint, or its image processor or feature extractor; None when it has none that works.

    Text can be measured without: `processor_fault` tells why where pictures or sound are to be.
    """
    try:
        return _processor(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any processor class: Pillow, torchvision, and code of the checkpoint are optional
        logger.warning("%s: no processor, only text can be measured: %s", name, reason(error))
        return None


def processor_fault(folder: Path) -> str:
    """Why `load_processor` found none, in words."""
    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        return f"there is no {PROCESSOR_FILES[-1]} beside its weights"
    try:
        _processor(folder)
    except Exception as error:  # as above
        return " ".join(reason(error).split())
    return "its processor makes neither pictures nor sound to tensors"


def _processor(folder: Path, *, trust_remote_code: bool = False) -> Any | None:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, PreTrainedTokenizerBase

    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        return None
    try:
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(found, PreTrainedTokenizerBase):
            return found
    except Exception:  # of any processor class; what follows may still do, else this is what is told
        alone = [c.from_pretrained for c in (AutoImageProcessor, AutoFeatureExtractor)]
        for load in (processor_without_video, *alone):
            try:
                return load(folder, trust_remote_code=trust_remote_code)
            except Exception as error:
                logger.debug("%s: %s", load, error)
        raise
    return None
