# SPDX-License-Identifier: Apache-2.0
"""An example to the arguments of a model, through the processor and the chat template that lie beside its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.corpus.examples import Example
from calib.corpus.media import Media, open_picture, open_sound
from calib.errors import CorpusError

__all__ = ["Preparation"]


class Preparation:
    """Turns examples into arguments.

    Args:
        processor: of transformers: for pictures, sound, or both with text; None where text is all there is.
        tokenizer: of transformers, or None.
        takes: what the model takes, of text, image and audio.
        names: the parameters of its forward pass; None if it takes any.
        max_length: tokens to which a text without pictures or sound is cut, and a target.
    """

    def __init__(
        self,
        processor: Any,
        tokenizer: Any,
        takes: frozenset[str],
        names: frozenset[str] | None,
        max_length: int,
    ) -> None:
        self._processor, self._tokenizer = processor, tokenizer
        self._takes, self._names, self._max_length = takes, names, max_length

    def tensors(self, example: Example) -> dict[str, Any]:
        """The arguments of a forward pass of one row, each a `torch.Tensor` with the row first.

        Raises:
            CorpusError: a file cannot be read, or the processor refuses the example or makes no input of it.
        """
        pictures = [open_picture(media, _where(example, media)) for media in example.images]
        sound = None
        if example.audio is not None:
            sound = open_sound(example.audio, self._rate(), _where(example, example.audio))
        with _refusal(example):
            made = self._made(example, pictures, sound)
        found = {name: value for name, value in made.items() if hasattr(value, "shape") and self._known(name)}
        if "text" in self._takes and ("input_ids" not in found or not found["input_ids"].numel()):
            raise CorpusError(f"{example.source}: has no text and the model reads some; add a field `text`")
        if not found:
            raise CorpusError(f"{example.source}: holds nothing that the model takes; give {_listed(self._takes)}")
        return found

    def target(self, example: Example) -> NDArray[np.int64] | None:
        """The token ids that a decoder is to write, int64 `[tokens]`; None if the example has none.

        Where the model reads no text, a `text` is what it is to write: a transcript, a caption.
        """
        text = example.target or (None if "text" in self._takes else example.text)
        if text is None:
            return None
        if self._tokenizer is None:
            raise CorpusError(f"{example.source}: a target needs a tokenizer and the model has none; take it out")
        encoded = self._tokenizer(text_target=text, truncation=True, max_length=self._max_length)
        return np.asarray(encoded["input_ids"], np.int64)

    def _known(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _rate(self) -> int:
        extractor = getattr(self._processor, "feature_extractor", self._processor)
        return int(getattr(extractor, "sampling_rate", 16000))

    def _made(self, example: Example, pictures: list[Any], sound: NDArray[np.float32] | None) -> dict[str, Any]:
        if "text" not in self._takes:
            if pictures:
                of_pictures = getattr(self._processor, "image_processor", self._processor)
                return dict(of_pictures(images=pictures, return_tensors="pt"))
            of_sound = getattr(self._processor, "feature_extractor", self._processor)
            return dict(of_sound(sound, sampling_rate=self._rate(), return_tensors="pt"))
        if not pictures and sound is None and example.messages is None:
            options = {"truncation": True, "max_length": self._max_length, "return_tensors": "pt"}
            made = dict(self._tokenizer(example.text or "", **options))
            made.pop("attention_mask", None)  # one row is never padded
            return made
        if self._converses(example):
            return dict(self._in_template(example, pictures, sound))
        marks = getattr(self._processor, "image_token", "") * len(pictures) if pictures else ""
        text = example.text or ""
        if marks and getattr(self._processor, "image_token", "") in text:
            marks = ""
        more = {} if sound is None else {"audio": [sound], "sampling_rate": self._rate()}
        return dict(self._processor(text=[marks + text], images=pictures or None, return_tensors="pt", **more))

    def _converses(self, example: Example) -> bool:
        """Whether the chat template writes the example: always for messages, else unless the text has marks itself."""
        if example.messages is not None:
            return True
        marks = [getattr(self._processor, f"{kind}_token", None) for kind in ("image", "audio")]
        placed = any(mark and mark in (example.text or "") for mark in marks)
        return bool(getattr(self._processor, "chat_template", None)) and not placed

    def _in_template(self, example: Example, pictures: list[Any], sound: NDArray[np.float32] | None) -> Any:
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in pictures]
        parts += [{"type": "audio"}] * (sound is not None)
        messages: list[dict[str, Any]]
        if example.messages is None:
            parts += [{"type": "text", "text": example.text}] if example.text else []
            messages = [{"role": "user", "content": parts}]
        else:
            messages = _with_parts(example, parts)
        waiting = {"image": iter(pictures), "audio": iter([sound])}
        filled = [{**message, "content": _filled(message["content"], waiting)} for message in messages]
        template = self._processor if self._processor is not None else self._tokenizer
        return template.apply_chat_template(filled, tokenize=True, return_dict=True, return_tensors="pt")


def _with_parts(example: Example, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a part for each picture and sound; what the messages do not place stands first."""
    messages: list[dict[str, Any]] = [
        {
            **m,
            "content": [{"type": "text", "text": m["content"]}] if isinstance(m.get("content"), str) else m["content"],
        }
        for m in example.messages or ()
    ]
    placed = [part for m in messages for part in m["content"] if part["type"] != "text"]
    if not placed:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [*parts, *first["content"]]
    elif len(placed) != len(parts):
        raise CorpusError(
            f"{example.source}: `messages` place {len(placed)} pictures and sounds and {len(parts)} are given; "
            "give as many"
        )
    return messages


def _filled(content: list[dict[str, Any]], waiting: dict[str, Iterator[Any]]) -> list[dict[str, Any]]:
    return [p if p["type"] == "text" else {**p, p["type"]: next(waiting[p["type"]])} for p in content]


def _where(example: Example, media: Media) -> str:
    return example.source if example.source == str(media.path) else f"{example.source}: {media.name}"


def _listed(kinds: frozenset[str]) -> str:
    return " and ".join(f"`{kind}`" for kind in sorted(kinds))


@contextmanager
def _refusal(example: Example) -> Iterator[None]:
    """What a processor or a template raises, on one line."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # of any processor, also of code that a checkpoint brings
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"{example.source}: the model's processor refuses it ({reason}); mend the example") from error
