# SPDX-License-Identifier: Apache-2.0
"""Examples: pictures, sound, and pairs of text, as folders, JSON lines and parquet hold them.

A record has `image` or `images` (paths relative to the folder of the list; in parquet also `{bytes, path}`, as data
sets hold pictures), `audio` (the same), `text`, `messages` whose content holds parts of the types text, image and
audio, and `target` (also `labels`), what a decoder writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.corpus.documents import default_domain, parse_source
from calib.corpus.media import PICTURES, SOUNDS, Media
from calib.corpus.readers import SUFFIXES, json_records, parquet_records
from calib.errors import CorpusError

__all__ = ["Example", "data_kinds", "hash_examples", "read_examples"]

_FIELDS = ("image", "images", "audio", "text", "messages", "target", "labels")
_LISTS = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Example:
    """One input of a model that takes more than one text.

    Attributes:
        images: its pictures, in the order in which the text shows them.
        audio: its sound.
        text: plain text.
        messages: a conversation; its parts name no files any more: pictures and sounds follow from `images`, `audio`.
        target: what a decoder is taught to write.
        domain: stratum of the selection.
        source: where it was read, for errors.
    """

    images: tuple[Media, ...] = ()
    audio: Media | None = None
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    target: str | None = None
    domain: str = "image"
    source: str = "example"


def data_kinds(specs: Sequence[str]) -> dict[str, frozenset[str]]:
    """What each source holds, of image, audio, text and target; told by its files, or the first record of a list.

    A folder of texts with pictures between them counts as both.
    """
    return {spec: _kinds(parse_source(spec)[1]) for spec in specs}


def read_examples(spec: str) -> Iterator[Example]:
    """Read the examples of one source, in an order that depends on nothing but the source.

    Args:
        spec: a folder of pictures or .wav files, one such file, or a .jsonl or .parquet file; `domain=` may precede.

    Raises:
        CorpusError: the source is missing or of another form, or a record is malformed.
    """
    domain, name = parse_source(spec)
    path = Path(name)
    fallback = domain or default_domain(name)
    if path.is_dir() or path.suffix.lower() in PICTURES | SOUNDS:
        files = _media_files(path) if path.is_dir() else [path]
        for file in files:
            is_sound = file.suffix.lower() in SOUNDS
            media = Media(file)
            yield Example(
                images=() if is_sound else (media,),
                audio=media if is_sound else None,
                domain=fallback,
                source=str(file),
            )
        return
    if not path.exists():
        raise CorpusError(f"{name}: no such file or folder; check the path")
    if path.suffix.lower() not in _LISTS:
        raise CorpusError(
            f"{name}: is text alone and cannot be mixed with pictures, sound or targets; measure it apart"
        )
    records = parquet_records(path, _FIELDS) if path.suffix.lower() == ".parquet" else json_records(path)
    for where, record in records:
        yield _example(record, where, path.parent, domain, fallback)


def hash_examples(examples: Sequence[Example]) -> str:
    """Return the sha256 over the content of examples in order, files by their bytes."""
    digest = hashlib.sha256()
    for example in examples:
        files = [hashlib.sha256(_bytes(media, example.source)).hexdigest() for media in _media(example)]
        content = [files, example.text, example.messages, example.target]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _media(example: Example) -> list[Media]:
    return [*example.images, *([example.audio] if example.audio else [])]


def _bytes(media: Media, where: str) -> bytes:
    with media.open(where if where == str(media.path) else f"{where}: {media.name}") as file:
        return file.read()


def _kinds(name: str) -> frozenset[str]:
    path = Path(name)
    suffix = path.suffix.lower()
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
        found = {"image": suffixes & PICTURES, "audio": suffixes & SOUNDS, "text": suffixes & set(SUFFIXES)}
        return frozenset(kind for kind, there in found.items() if there)
    if suffix in PICTURES | SOUNDS:
        return frozenset({"image" if suffix in PICTURES else "audio"})
    if suffix not in _LISTS or not path.is_file():
        return frozenset({"text"})
    records = parquet_records(path, _FIELDS) if suffix == ".parquet" else json_records(path)
    for _, record in records:
        return _record_kinds(record)
    return frozenset({"text"})


def _record_kinds(record: object) -> frozenset[str]:
    if not isinstance(record, Mapping):
        return frozenset({"text"})
    there = {name for name in _FIELDS if record.get(name)}
    kinds = {"image"} if there & {"image", "images"} else set()
    kinds |= {"audio"} & there
    kinds |= {"target"} if there & {"target", "labels"} else set()
    kinds |= {str(part.get("type")).partition("_")[0] for part in _parts(record.get("messages"))} & {"image", "audio"}
    kinds |= {"text"} if there & {"text", "messages"} or "input_ids" in record or not kinds else set()
    return frozenset(kinds)


def _parts(messages: object) -> list[Mapping[str, Any]]:
    """All parts of the content of a conversation that are not plain strings."""
    listed = messages if isinstance(messages, list | tuple) else []
    contents = [m.get("content") for m in listed if isinstance(m, Mapping)]
    return [part for c in contents if isinstance(c, list) for part in c if isinstance(part, Mapping)]


def _media_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in PICTURES | SOUNDS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _example(record: object, where: str, folder: Path, domain: str | None, fallback: str) -> Example:
    if not isinstance(record, Mapping):
        raise CorpusError(f"{where}: not an object; expected one of the fields {', '.join(_FIELDS)}")
    given = {name: record[name] for name in _FIELDS if record.get(name) is not None}
    if not given:
        found = ", ".join(map(str, list(record)[:8])) or "nothing"
        raise CorpusError(f"{where}: none of the fields {', '.join(_FIELDS)}; found {found}, rename the field")
    images = _found(given.get("images", given.get("image", [])), where, folder)
    audio = _found(given.get("audio", []), where, folder)
    messages = None
    if "messages" in given:
        messages, shown, heard = _conversation(given["messages"], where, folder)
        images, audio = [*images, *shown], [*audio, *heard]
    if len(audio) > 1:
        raise CorpusError(f"{where}: {len(audio)} sounds in one example; give one")
    named = record.get("domain")
    return Example(
        images=tuple(images),
        audio=audio[0] if audio else None,
        text=_string(given, "text", where),
        messages=messages,
        target=_string(given, "target", where) or _string(given, "labels", where),
        domain=domain or (named if isinstance(named, str) and named else fallback),
        source=where,
    )


def _string(given: Mapping[str, Any], name: str, where: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise CorpusError(f"{where}: `{name}` is a {type(value).__name__}; write a string")
    return value or None


def _found(value: object, where: str, folder: Path) -> list[Media]:
    """What a field names, one or a list: paths, or `{bytes, path}`."""
    found = []
    for entry in value if isinstance(value, list | tuple) else [value]:
        path, content = entry, None
        if isinstance(entry, Mapping):
            path, content = entry.get("path"), entry.get("bytes")
        if isinstance(content, bytes):
            found.append(Media(Path(path if isinstance(path, str) and path else "bytes"), content))
        elif isinstance(path, str) and "://" not in path:
            found.append(Media(folder / path))
        else:
            shown = path if isinstance(path, str) else type(path).__name__
            raise CorpusError(f"{where}: {shown!r} is no path; name a file relative to the folder of the list")
    return found


def _conversation(
    value: object, where: str, folder: Path
) -> tuple[tuple[Mapping[str, Any], ...], list[Media], list[Media]]:
    """Messages whose parts name no files any more, and the files, in order."""
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        raise CorpusError(f'{where}: `messages` is malformed; write [{{"role": "user", "content": "..."}}, ...]')
    found: dict[str, list[Media]] = {"image": [], "audio": []}
    messages = []
    for message in value:
        content = message.get("content")
        if not isinstance(content, list):
            messages.append(dict(message))
            continue
        parts = []
        for part in content:
            kind = str(part.get("type", "")).partition("_")[0] if isinstance(part, Mapping) else ""
            if kind not in ("text", "image", "audio"):
                raise CorpusError(f"{where}: a part of `messages` is neither text, image nor audio; take it out")
            if kind == "text":
                parts.append({"type": "text", "text": str(part.get("text", ""))})
                continue
            file = next((part[key] for key in (kind, "path", "url", f"{kind}_url") if part.get(key)), None)
            if file is not None:
                file = file.get("url") if isinstance(file, Mapping) else file
                found[kind] += _found(file, where, folder)
            parts.append({"type": kind})
        messages.append({**message, "content": parts})
    return tuple(messages), found["image"], found["audio"]
