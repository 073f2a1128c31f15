# SPDX-License-Identifier: Apache-2.0
"""Documents become token ids without anything that was not asked for, and tokenizers are told apart by what they do."""

from __future__ import annotations

from typing import Any

import pytest

from calib.corpus import Document, tokenizer_sha256
from calib.corpus.tokens import Encoder
from calib.errors import CorpusError

TALK = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "2"})


def test_text_is_encoded_without_special_tokens(words: Any) -> None:
    assert Encoder(words).encode(Document(text="5 6 7")).tolist() == [5, 6, 7]


def test_a_long_text_raises_no_warning(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    words.model_max_length = 4
    assert Encoder(words).encode(Document(text="5 " * 50)).shape == (50,)
    assert not caplog.records


def test_token_ids_win_over_messages_and_these_over_text(words: Any) -> None:
    document = Document(text="3", messages=TALK, token_ids=(9,))
    assert Encoder(words, chat_template=True).encode(document).tolist() == [9]
    document = Document(text="3", messages=TALK)
    assert Encoder(words).encode(document).tolist() == [3]
    assert Encoder(words, chat_template=True).encode(document).tolist() == [1000, 1002, 1, 1000, 1003, 2]


def test_token_ids_need_no_tokenizer() -> None:
    assert Encoder(None).encode(Document(token_ids=(10**6,))).tolist() == [10**6]


def test_the_bos_of_an_encoder_is_its_cls(bpe: Any, words: Any) -> None:
    assert Encoder(words, add_bos=True).bos_id == 1000
    assert Encoder(words).bos_id is None
    words.bos_token = None
    words.cls_token = "assistant"
    assert Encoder(words, add_bos=True).bos_id == 1003


def test_options_that_the_tokenizer_lacks_are_refused(bpe: Any) -> None:
    for tokenizer in (bpe, None):
        with pytest.raises(CorpusError, match="--add-bos: the tokenizer has neither a BOS nor a CLS"):
            Encoder(tokenizer, add_bos=True)
        with pytest.raises(CorpusError, match="--chat-template: the tokenizer has no chat template"):
            Encoder(tokenizer, chat_template=True)


def test_token_ids_outside_of_the_vocabulary_are_refused(words: Any) -> None:
    assert Encoder(words).encode(Document(token_ids=(1003,))).tolist() == [1003]
    with pytest.raises(
        CorpusError, match=r"x\.jsonl:3: token id 1004 is outside of the tokenizer's vocabulary of 1004"
    ):
        Encoder(words).encode(Document(token_ids=(1, 1004), source="x.jsonl:3"))
    with pytest.raises(CorpusError, match="token id -2 is outside"):
        Encoder(words).encode(Document(token_ids=(-2,)))


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"a\.txt: text needs a tokenizer and the model has none"):
        Encoder(None).encode(Document(text="x", source="a.txt"))


def test_a_conversation_without_the_template_is_refused(words: Any) -> None:
    with pytest.raises(CorpusError, match=r"c\.jsonl:1: a conversation without text; pass --chat-template"):
        Encoder(words).encode(Document(messages=TALK, source="c.jsonl:1"))


def test_a_conversation_that_the_template_refuses_is_named(words: Any) -> None:
    document = Document(messages=({"role": "tool", "content": "x"},), source="c.jsonl:4")
    with pytest.raises(CorpusError, match=r"c\.jsonl:4: the chat template refuses the conversation \(unknown role\)"):
        Encoder(words, chat_template=True).encode(document)


def test_the_template_is_recorded_exactly_when_it_is_applied(words: Any) -> None:
    import hashlib

    encoder = Encoder(words, chat_template=True)
    assert encoder.chat_template_sha256 == hashlib.sha256(words.chat_template.encode()).hexdigest()
    assert Encoder(words).chat_template_sha256 is None
    words.chat_template = {"default": words.chat_template, "tools": "x"}
    assert Encoder(words, chat_template=True).chat_template_sha256 == encoder.chat_template_sha256


def test_equal_tokenizers_have_equal_hashes_whatever_was_called_before(words: Any, bpe: Any) -> None:
    before = tokenizer_sha256(words)
    words("1 2 3", truncation=True, max_length=2, padding=False)
    words.chat_template = None
    assert tokenizer_sha256(words) == before
    words.add_tokens(["new"])
    assert tokenizer_sha256(words) != before
    assert tokenizer_sha256(bpe) != before
    assert tokenizer_sha256(None) is None


def test_a_tokenizer_without_a_backend_is_hashed_by_its_vocabulary() -> None:
    class Slow:
        def __init__(self, vocabulary: dict[str, int]) -> None:
            self._vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self._vocabulary

    assert tokenizer_sha256(Slow({"a": 0, "b": 1})) == tokenizer_sha256(Slow({"b": 1, "a": 0}))
    assert tokenizer_sha256(Slow({"a": 0})) != tokenizer_sha256(Slow({"b": 0}))
