# SPDX-License-Identifier: Apache-2.0
"""Hub datasets are streamed as far as needed; what cannot be had is told in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from calib.corpus import read_documents
from calib.errors import CorpusError

INSTALLED = importlib.util.find_spec("datasets") is not None


@pytest.mark.skipif(INSTALLED, reason="the optional package is installed")
@pytest.mark.parametrize("spec", ["hub:owner/name", "hub:owner/name@config:test", "owner/name"])
def test_without_the_optional_package_the_error_names_it(spec: str) -> None:
    with pytest.raises(CorpusError, match=r"owner/name.*optional package; pip install calib\[datasets\]"):
        list(read_documents(spec))


def test_an_existing_folder_is_never_taken_for_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("local")
    assert [document.text for document in read_documents("owner/name")] == ["local"]


@pytest.mark.parametrize("spec", ["a/b/c", "owner/name.txt", "./owner", "name"])
def test_what_does_not_look_like_a_hub_id_is_a_missing_path(spec: str) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        read_documents(spec)


@pytest.mark.skipif(not INSTALLED, reason="needs datasets")
def test_streaming_stops_after_the_text_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "hello"}\n{"text": ""}\n' * 5)
    assert len(list(read_documents("hub:owner/name"))) == 5
    assert [d.source for d in read_documents("hub:owner/name", max_characters=6)] == [
        "hub:owner/name: row 0",
        "hub:owner/name: row 2",
    ]


@pytest.mark.skipif(not INSTALLED, reason="needs datasets")
def test_a_split_that_does_not_exist_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(CorpusError, match=r"hub:owner/name:dev: cannot be streamed .*; check the name") as caught:
        list(read_documents("hub:owner/name:dev"))
    assert "\n" not in str(caught.value)
