# SPDX-License-Identifier: Apache-2.0
"""Documents to token ids: without special tokens, the chat template and the BOS only when asked for, both recorded."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.corpus.documents import Document
from calib.errors import CorpusError

__all__ = ["Encoder", "tokenizer_sha256"]


class Encoder:
    """Turns documents into token ids with one tokenizer and one set of options.

    Args:
        tokenizer: Any tokenizer of transformers, or None if all documents hold token ids.
        add_bos: Whether blocks will begin with the BOS (`bos_id`).
        chat_template: Whether conversations are written with the tokenizer's chat template.

    Attributes:
        bos_id: Id of the BOS, of the CLS for encoders, which have no BOS; None unless `add_bos`.
        chat_template_sha256: Hash of the template's text; None unless `chat_template`.

    Raises:
        CorpusError: An option is asked for that the tokenizer does not support.
    """

    def __init__(self, tokenizer: Any | None, *, add_bos: bool = False, chat_template: bool = False) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size: int | None = None
        self._chat = chat_template
        self.bos_id = _first_token(tokenizer) if add_bos else None
        self.chat_template_sha256: str | None = None
        if chat_template:
            self.chat_template_sha256 = hashlib.sha256(_template(tokenizer).encode()).hexdigest()

    def encode(self, document: Document) -> NDArray[np.int64]:
        """Return the token ids of a document, int64 `[tokens]`.

        Raises:
            CorpusError: Ids outside of the vocabulary, text without a tokenizer, a conversation without a template.
        """
        if document.token_ids is not None:
            ids = np.asarray(document.token_ids, dtype=np.int64)
            self._check_vocabulary(ids, document.source)
            return ids
        text = self._text(document)
        if self._tokenizer is None:
            raise CorpusError(f"{document.source}: text needs a tokenizer and the model has none; give `input_ids`")
        # verbose=False: a document longer than the model's context is cut into blocks, there is nothing to warn of.
        encoded = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def _text(self, document: Document) -> str:
        if document.messages is not None and self._chat:
            return self._conversation(document)
        if document.text is not None:
            return document.text
        raise CorpusError(f"{document.source}: a conversation without text; pass --chat-template")

    def _conversation(self, document: Document) -> str:
        from jinja2 import TemplateError

        assert self._tokenizer is not None
        messages = [dict(message) for message in document.messages or ()]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CorpusError(
                f"{document.source}: the chat template refuses the conversation ({reason}); mend its messages"
            ) from error

    def _check_vocabulary(self, ids: NDArray[np.int64], source: str) -> None:
        if self._tokenizer is None or not ids.size:
            return
        if self._vocabulary_size is None:
            self._vocabulary_size = 1 + max(self._tokenizer.get_vocab().values())
        if ids.max() >= self._vocabulary_size or ids.min() < 0:
            outside = int(ids.max() if ids.max() >= self._vocabulary_size else ids.min())
            raise CorpusError(
                f"{source}: token id {outside} is outside of the tokenizer's vocabulary of {self._vocabulary_size}; "
                "tokenize with the model's own tokenizer, or give text"
            )


def tokenizer_sha256(tokenizer: Any | None) -> str | None:
    """Return a hash that is equal for tokenizers that turn text into the same ids; None without a tokenizer.

    Truncation and padding, which calls leave behind in a fast tokenizer, and the chat template do not enter.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _first_token(tokenizer: Any | None) -> int:
    for name in ("bos_token_id", "cls_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise CorpusError("--add-bos: the tokenizer has neither a BOS nor a CLS token; leave the option out")


def _template(tokenizer: Any | None) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several named templates, as some tokenizers carry
        template = template.get("default")
    if not template:
        raise CorpusError("--chat-template: the tokenizer has no chat template; leave the option out, or give text")
    return str(template)
