# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from torch import nn

from calib.models import module_provenance, open_model
from calib.models.hashing import sha256_of_file


def test_a_file_hash_is_its_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_tied_parameters_count_once(tiny_llama: Path) -> None:
    opened = open_model(tiny_llama, device="cpu")
    untied = sum(tensor.numel() for tensor in opened.model.state_dict().values())
    assert opened.provenance.parameters == untied - 300 * 64


def test_a_copy_has_the_same_fingerprint_and_a_changed_byte_another(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    fingerprint = open_model(tiny_llama, device="cpu").provenance.fingerprint
    assert open_model(copy, device="cpu").provenance.fingerprint == fingerprint
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert open_model(copy, device="cpu").provenance.fingerprint != fingerprint


def test_several_tokenizer_files_are_hashed_together(tiny_bert: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bert, tmp_path / "copy"))
    vocabulary = open_model(copy, device="cpu").tokenizer.get_vocab()
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    lines = "\n".join(f"{name}={sha256_of_file(copy / name)}" for name in ("tokenizer_config.json", "vocab.txt"))
    assert open_model(copy, device="cpu").provenance.tokenizer_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_a_module_in_memory_is_identified_by_its_tensors() -> None:
    def build(value: float = 0.5, dtype: torch.dtype = torch.float32) -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
        for tensor in module.state_dict().values():
            tensor.fill_(value)
        return module

    first = module_provenance(build(), "mine")
    assert first == module_provenance(build(), "mine")
    assert (first.name, first.architecture, first.model_type) == ("mine", "Sequential", "module")
    assert (first.task, first.source_format, first.dtype, first.parameters) == ("unknown", "memory", "float32", 12)
    assert first.fingerprint != module_provenance(build(0.25), "mine").fingerprint
    assert first.fingerprint != module_provenance(build(dtype=torch.bfloat16), "mine").fingerprint
    assert module_provenance(build(dtype=torch.bfloat16), "mine").dtype == "bfloat16"


def test_a_module_without_tensors_has_a_provenance() -> None:
    assert module_provenance(nn.ReLU(), "relu").dtype == "none"


def test_a_transformers_model_in_memory_says_what_it_is(tiny_llama: Path) -> None:
    first, second = (open_model(tiny_llama, device="cpu").model for _ in range(2))
    provenance = module_provenance(first, "mine")
    assert (provenance.model_type, provenance.task) == ("llama", "text-generation")
    second.config._name_or_path = "elsewhere"
    assert module_provenance(second, "mine") == provenance
    second.config.rms_norm_eps = 0.1
    assert module_provenance(second, "mine").fingerprint != provenance.fingerprint
