# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from calib.errors import ModelError, UsageError
from calib.models import open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def llama_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


@pytest.fixture
def hub_cache(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as a download leaves it, with one model in it."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_llama, repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_hub_id_is_opened_from_the_cache_with_its_commit(hub_cache: Path) -> None:
    opened = open_model("acme/tiny", device="cpu")
    assert opened.provenance.name == "acme/tiny"
    assert opened.provenance.revision == COMMIT
    assert opened.task == "text-generation"
    assert opened.folder == hub_cache / "snapshots" / COMMIT


def test_a_revision_that_is_not_cached_is_refused_offline(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match=r"acme/tiny.*the hub could not be reached; pass a local folder"):
        open_model("acme/tiny", revision="v2", device="cpu")


@pytest.mark.parametrize("reference", ["nobody/nothing", "nothing-at-all"])
def test_a_hub_id_offline_says_that_the_hub_could_not_be_reached(reference: str) -> None:
    with pytest.raises(ModelError, match=r"no such local path, and the hub could not be reached; pass a local folder"):
        open_model(reference, device="cpu")


@pytest.mark.parametrize("reference", ["./missing", "/missing/folder", "a/b/c", "what is this?", "gone.gguf", ""])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(reference: str) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder; pass a folder with config.json"):
        open_model(reference, device="cpu")


def test_a_revision_of_local_files_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="only a hub id has revisions"):
        open_model(tiny_llama, revision="main", device="cpu")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json in this folder"):
        open_model(tmp_path, device="cpu")


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter without its model; merge it"):
        open_model(tmp_path, device="cpu")


def test_several_gguf_files_in_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"2 GGUF files \(a.gguf, b.gguf\); pass one of them"):
        open_model(tmp_path, device="cpu")


def test_a_file_that_is_not_gguf_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"not \.gguf; pass the folder"):
        open_model(tiny_llama / "model.safetensors", device="cpu")


def test_a_config_that_is_not_json_is_refused(llama_copy: Path) -> None:
    (llama_copy / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config.json is not valid JSON"):
        open_model(llama_copy, device="cpu")
    (llama_copy / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json holds no JSON object"):
        open_model(llama_copy, device="cpu")


def test_a_folder_without_weights_is_refused(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights beside config.json; expected model.safetensors"):
        open_model(llama_copy, device="cpu")


def test_a_missing_shard_is_refused_by_name(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").rename(llama_copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (llama_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing, first model-00002-of-00002.safetensors"):
        open_model(llama_copy, device="cpu")


def test_an_index_without_a_map_is_refused(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").unlink()
    (llama_copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        open_model(llama_copy, device="cpu")
