# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the image processor that lie beside the weights, where there are any that work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from calib.errors import ModelError
from calib.models.checkpoint import TOKENIZER_FILES
from calib.models.reason import reason

__all__ = ["load_processor", "load_tokenizer"]

logger = logging.getLogger(__name__)


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
        logger.warning("%s: no tokenizer, only token ids can be measured: %s%s", name, reason(error), hint)
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
    """The image processor of a checkpoint; None when it has none or its libraries are not installed."""
    from transformers import AutoImageProcessor

    if not (folder / "preprocessor_config.json").is_file():
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Pillow and torchvision are optional: tensors can be measured without them.
        logger.warning("%s: no image processor: %s", name, reason(error))
        return None
