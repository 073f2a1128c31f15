# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from calib.errors import ModelError
from calib.models import convert_gguf, memory, open_model
from calib.models.gguf import cache_root, publish
from calib.models.hashing import sha256_of_file

WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN = 64, 2, 4, 2, 128


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with Q8_0 matrices, float32 norms and a byte-level tokenizer in one file of 160 kB."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t.startswith("<") else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k": (WIDTH // HEADS * KV_HEADS, WIDTH),
            f"blk.{layer}.attn_v": (WIDTH // HEADS * KV_HEADS, WIDTH),
            f"blk.{layer}.attn_output": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{layer}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{layer}.ffn_down": (WIDTH, HIDDEN),
        }
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        data = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to let a file grow beyond 20 kB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_gguf_file_computes_what_transformers_computes_from_it(tiny_gguf: Path, cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    direct = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    opened = open_model(tiny_gguf, device="cpu")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, direct.eval()(ids).logits)
    assert opened.folder.is_relative_to(cache)
    assert opened.provenance.name == "tiny.Q8_0.gguf"
    assert opened.provenance.source_format == "gguf:Q8_0"
    assert opened.provenance.dtype == "float32"
    assert list(opened.provenance.weights_sha256) == ["model.safetensors"]


def test_the_tokenizer_and_the_chat_template_come_along(tiny_gguf: Path, tiny_llama: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    text = "Größe: 12 whales\n"
    tokenizer = open_model(tiny_gguf, device="cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_the_converted_folder_is_an_ordinary_checkpoint(tiny_gguf: Path, cache: Path) -> None:
    folder = convert_gguf(tiny_gguf)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "calib_source.json").read_text()) == {
        "format": "gguf",
        "quantization": "Q8_0",
        "file": "tiny.Q8_0.gguf",
        "file_sha256": sha256_of_file(tiny_gguf),
    }
    assert open_model(folder, device="cpu").provenance.source_format == "gguf:Q8_0"


def test_a_folder_with_one_gguf_file_is_that_file(tiny_gguf: Path, cache: Path) -> None:
    assert open_model(tiny_gguf.parent, device="cpu").provenance == open_model(tiny_gguf, device="cpu").provenance


def test_a_file_is_converted_once_whatever_its_name(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    first = convert_gguf(tiny_gguf)
    made = (first / "model.safetensors").stat().st_mtime_ns
    copy = Path(shutil.copy(tiny_gguf, tmp_path / "renamed.gguf"))
    assert convert_gguf(copy) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [sha256_of_file(tiny_gguf)]


def test_two_conversions_are_byte_equal(tiny_gguf: Path, cache: Path) -> None:
    first = {path.name: sha256_of_file(path) for path in convert_gguf(tiny_gguf).iterdir()}
    shutil.rmtree(cache)
    assert {path.name: sha256_of_file(path) for path in convert_gguf(tiny_gguf).iterdir()} == first


@pytest.mark.parametrize("keep", [0, 3, 500, 20_000])
def test_a_damaged_file_is_refused_and_leaves_nothing(tiny_gguf: Path, cache: Path, tmp_path: Path, keep: int) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"damaged.gguf: truncated or not a GGUF file"):
        open_model(damaged, device="cpu")
    assert list(cache.rglob("*.*")) == []


def test_an_architecture_that_transformers_cannot_read_is_refused(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "oddity")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"odd.gguf: transformers cannot read it .*oddity"):
        open_model(path, device="cpu")
    assert list((cache / "gguf").iterdir()) == []


def test_one_part_of_a_split_file_is_refused(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one part of a split file"):
        convert_gguf(path)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up_leaves_no_half_copy(tiny_gguf: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be converted .*check the disk or set CALIB_CACHE"):
        convert_gguf(tiny_gguf)
    assert list((cache / "gguf").iterdir()) == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CALIB_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("CALIB_CACHE")
    assert cache_root() == Path.home() / ".cache" / "calib"


def test_a_copy_that_does_not_fit_into_memory_is_refused(
    tiny_gguf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000")
    (tmp_path / "memory.current").write_text("90000")
    (tmp_path / "memory.stat").write_text("inactive_file 0")
    with pytest.raises(ModelError, match=r"needs 0.0 GB of memory, 0.0 GB are available; convert it on a larger"):
        convert_gguf(tiny_gguf)
    assert list((cache / "gguf").iterdir()) == []


def test_of_two_conversions_at_a_time_the_first_stays(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    folder = convert_gguf(tiny_gguf)
    late = Path(shutil.copytree(folder, tmp_path / "late"))
    publish(late, folder)
    assert (folder / "calib_source.json").is_file()
    (folder / "calib_source.json").unlink()
    with pytest.raises(OSError, match="not empty"):
        publish(late, folder)
