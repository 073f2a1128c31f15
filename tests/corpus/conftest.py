# SPDX-License-Identifier: Apache-2.0
"""Two real tokenizers, made on the spot: one word per token, so that blocks can be read, and byte-level BPE."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from calib.corpus import builtin_documents

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "<s> {{ message.role }} {{ message.content }} {% endfor %}"
)


@pytest.fixture
def words() -> Any:
    """Word-level: '17' is token 17; <s> is 1000, <unk> 1001, <s> is also the BOS; `user` and `assistant` are tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*map(str, range(1000)), "<s>", "<unk>", "user", "assistant"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def bpe() -> Any:
    """Byte-level BPE of 1,000 tokens, trained on a little of the built-in corpus; neither BOS nor chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()
    texts = [document.text for document in islice(builtin_documents(), 0, None, 12)]
    backend.train_from_iterator([text for text in texts if text], vocab_size=1000, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)
