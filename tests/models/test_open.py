# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.errors import ModelError, UsageError
from calib.models import OpenedModel, open_model


@pytest.fixture
def llama_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fixture", "task", "architecture", "model_type"),
    [
        ("tiny_llama", "text-generation", "LlamaForCausalLM", "llama"),
        ("tiny_gpt2", "text-generation", "GPT2LMHeadModel", "gpt2"),
        ("tiny_bert", "fill-mask", "BertForMaskedLM", "bert"),
        ("minilm", "feature-extraction", "BertModel", "bert"),
        ("rxnmapper", "fill-mask", "AlbertForMaskedLM", "albert"),
    ],
)
def test_the_architecture_of_a_folder_decides_task_and_class(
    fixture: str, task: str, architecture: str, model_type: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    opened = open_model(folder, device="cpu")
    assert isinstance(opened, OpenedModel)
    assert (opened.task, opened.provenance.task) == (task, task)
    assert type(opened.model).__name__ == opened.provenance.architecture == architecture
    assert opened.provenance.model_type == model_type
    assert opened.folder == folder
    assert not opened.model.training


def test_the_loaded_weights_are_those_of_the_file(tiny_llama: Path) -> None:
    state = open_model(str(tiny_llama), device="cpu").model.state_dict()
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name


def test_the_provenance_holds_the_hash_of_every_file(tiny_llama: Path) -> None:
    provenance = open_model(tiny_llama, device="cpu").provenance

    def sha256(name: str) -> str:
        return hashlib.sha256((tiny_llama / name).read_bytes()).hexdigest()

    assert provenance.name == tiny_llama.name
    assert provenance.revision is None
    assert provenance.source_format == "safetensors"
    assert provenance.dtype == "float32"
    assert provenance.weights_sha256 == {"model.safetensors": sha256("model.safetensors")}
    assert provenance.config_sha256 == sha256("config.json")
    assert provenance.tokenizer_sha256 == sha256("tokenizer.json")


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32)]
)
def test_the_user_chooses_the_dtype(tiny_llama: Path, dtype: str, expected: torch.dtype) -> None:
    opened = open_model(tiny_llama, dtype=dtype, device="cpu")
    assert {p.dtype for p in opened.model.parameters()} == {expected}
    assert opened.provenance.dtype == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtype_auto_keeps_what_the_checkpoint_says(tiny_llama: Path, tmp_path: Path, stored: torch.dtype) -> None:
    opened = open_model(tiny_llama, device="cpu")
    opened.model.to(stored).save_pretrained(tmp_path / "half")
    assert open_model(tmp_path / "half", device="cpu").provenance.dtype == str(stored).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["float64", "int8", "half-precision"])
def test_another_dtype_is_refused_with_the_valid_ones(tiny_llama: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match="auto, float32, bfloat16 or float16"):
        open_model(tiny_llama, dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:", "gpu"])
def test_another_device_is_refused_with_the_valid_ones(tiny_llama: Path, device: str) -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda, cuda:N or balanced"):
        open_model(tiny_llama, device=device)


def test_a_device_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"PyTorch sees \d+ CUDA devices"):
        open_model(tiny_llama, device="cuda:99")


def test_a_task_may_be_named_by_a_synonym(tiny_llama: Path) -> None:
    assert open_model(tiny_llama, task="causal-lm", device="cpu").task == "text-generation"


def test_an_unknown_task_is_refused_with_the_valid_ones(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"task 'guessing': unknown; choose one of .*text-generation"):
        open_model(tiny_llama, task="guessing")


def test_a_task_without_a_class_for_this_model_type_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"llama has no model class for image-classification; pass --task .*text-gen"):
        open_model(tiny_llama, task="image-classification", device="cpu")


def test_weights_that_the_checkpoint_lacks_are_never_made_up(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification .*\(score.weight\).*random numbers"):
        open_model(tiny_llama, task="text-classification", device="cpu")


def test_an_encoder_cut_out_of_a_masked_language_model_has_no_random_pooler(tiny_bert: Path) -> None:
    opened = open_model(tiny_bert, task="feature-extraction", device="cpu")
    assert opened.provenance.architecture == "BertModel"
    assert not any(name.startswith("pooler") for name, _ in opened.model.named_parameters())


def test_a_tokenizer_comes_with_its_model(tiny_llama: Path) -> None:
    tokenizer = open_model(tiny_llama, device="cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("Größe, 12 whales")["input_ids"]) == "Größe, 12 whales"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi</s>"


def test_a_tokenizer_without_its_vocabulary_is_not_used(rxnmapper: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = open_model(rxnmapper, device="cpu")
    assert opened.tokenizer is None
    assert opened.provenance.tokenizer_sha256 is None
    assert "only token ids can be measured: AlbertTokenizer needs" in caplog.text


def test_a_weight_of_another_size_is_named(llama_copy: Path) -> None:
    weights = load_file(llama_copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: torch.zeros(3, 5)}, llama_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"cannot load it: {name} has shape \[3, 5\], and \["):
        open_model(llama_copy, device="cpu")


def test_a_damaged_tokenizer_leaves_a_model_for_token_ids(llama_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (llama_copy / "tokenizer.json").write_text("{")
    assert open_model(llama_copy, device="cpu").tokenizer is None
    assert "no tokenizer" in caplog.text
    assert "Error: " in caplog.text


def test_a_sentencepiece_file_that_cannot_be_read_says_what_to_install(
    llama_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (llama_copy / "tokenizer.json").unlink()
    (llama_copy / "tokenizer.model").write_bytes(b"not a model")
    (llama_copy / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert open_model(llama_copy, device="cpu").tokenizer is None
    assert "pip install calib[sentencepiece]" in caplog.text


def test_a_folder_without_tokenizer_files_has_no_tokenizer(llama_copy: Path) -> None:
    for path in [*llama_copy.glob("tokenizer*"), *llama_copy.glob("*.jinja")]:
        path.unlink()
    opened = open_model(llama_copy, device="cpu")
    assert opened.tokenizer is None
    assert opened.provenance.tokenizer_sha256 is None


def test_an_image_classifier_is_opened_with_its_processor_or_says_why_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    opened = open_model(tmp_path, device="cpu")
    assert (opened.task, opened.tokenizer) == ("image-classification", None)
    # Pillow and torchvision are not dependencies.
    assert (opened.processor is None) == ("no image processor" in caplog.text)


def test_pickled_weights_are_read_without_running_code(rxnmapper: Path) -> None:
    provenance = open_model(rxnmapper, device="cpu").provenance
    assert provenance.source_format == "pytorch"
    assert list(provenance.weights_sha256) == ["pytorch_model.bin"]


def test_a_pickle_that_runs_code_is_refused(llama_copy: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    (llama_copy / "model.safetensors").unlink()
    torch.save({"x": Malicious()}, llama_copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot load it"):
        open_model(llama_copy, device="cpu")
    assert not (tmp_path / "touched").exists()


def test_sharded_weights_are_hashed_shard_by_shard(tiny_llama: Path, tmp_path: Path) -> None:
    opened = open_model(tiny_llama, device="cpu")
    opened.model.save_pretrained(tmp_path, max_shard_size="200KB")
    again = open_model(tmp_path, device="cpu")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert list(again.provenance.weights_sha256) == shards
    assert torch.equal(again.model.lm_head.weight, opened.model.lm_head.weight)


def test_transformers_is_left_as_loud_as_it_was(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    open_model(tiny_llama, device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert "Loading weights" not in capsys.readouterr().err


def test_nan_weights_are_refused_by_name_and_number(llama_copy: Path) -> None:
    edit_weights(llama_copy, "model.layers.1.mlp.down_proj.weight", float("nan"))
    with pytest.raises(ModelError, match=r"1 of 8192 values of model.layers.1.mlp.down_proj.weight are NaN or infin"):
        open_model(llama_copy, device="cpu")


def test_a_vocabulary_larger_than_the_embedding_is_refused(llama_copy: Path) -> None:
    tensors = load_file(llama_copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:280].contiguous()
    save_file(tensors, llama_copy / "model.safetensors", metadata={"format": "pt"})
    edit_config(llama_copy, vocab_size=280)
    with pytest.raises(ModelError, match="the tokenizer has 300 tokens, the embedding 280 rows"):
        open_model(llama_copy, device="cpu")


def test_truncated_weights_are_refused_by_file(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated or damaged"):
        open_model(llama_copy, device="cpu")


def test_a_tampered_header_is_refused_by_file(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[9:12] = b"\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors is truncated or damaged"):
        open_model(llama_copy, device="cpu")


def test_shapes_that_contradict_the_configuration_are_refused(llama_copy: Path) -> None:
    edit_config(llama_copy, intermediate_size=96)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot load it"):
        open_model(llama_copy, device="cpu")


def test_a_model_that_cannot_fit_is_refused_with_bytes_and_flags(llama_copy: Path) -> None:
    # A sparse file: the header promises 4 TB, nothing is stored.
    elements = 1 << 40
    header = json.dumps({"w": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}).encode()
    with (llama_copy / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * elements)
    with pytest.raises(ModelError, match=r"need 4398.0 GB on cpu, [\d.]+ GB are available; pass --dtype bfloat16"):
        open_model(llama_copy, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0", "balanced"])
def test_every_parameter_lies_on_the_gpu(tiny_llama: Path, dtype: str, device: str) -> None:
    opened = open_model(tiny_llama, dtype=dtype, device=device)
    assert {p.device.type for p in opened.model.parameters()} == {"cuda"}
    assert opened.provenance.dtype == dtype
    with torch.no_grad():
        logits = opened.model(torch.tensor([[5, 6, 7]], device="cuda")).logits
    assert bool(logits.isfinite().all())


@pytest.mark.gpu
def test_gpu_and_cpu_give_one_fingerprint(tiny_llama: Path) -> None:
    assert open_model(tiny_llama, device="cuda").provenance == open_model(tiny_llama, device="cpu").provenance
