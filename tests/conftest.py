# SPDX-License-Identifier: Apache-2.0
"""Models for all tests: three tiny ones made here in milliseconds, three real ones fetched once into the cache."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Before anything imports huggingface_hub: no test talks to the hub or writes into the user's own cache of it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(ROOT / ".cache" / "huggingface")

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = (
    "The whale swam through the cold water, and the sailors watched it in silence. "
    "What is measured once can be decided forever: the scale, the clipping and the error."
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU its tests are skipped, visibly; `make test-gpu` refuses to start there."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _assets() -> Any:
    """`benchmarks/assets.py` as a module; it is a script of the repository, not part of the package."""
    if "calib_assets" not in sys.modules:
        spec = importlib.util.spec_from_file_location("calib_assets", ROOT / "benchmarks" / "assets.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["calib_assets"] = module
        spec.loader.exec_module(module)
    return sys.modules["calib_assets"]


@pytest.fixture(scope="session")
def fetch_asset() -> Any:
    """`fetch(name) -> Path` of benchmarks/assets.py."""
    return _assets().fetch


@pytest.fixture(scope="session")
def smollm2_gguf(fetch_asset: Any) -> Path:
    """SmolLM2-135M-Instruct as the Q4_1 GGUF file that the package holds."""
    return fetch_asset("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct in float32 safetensors, converted once (about half a minute) into the cache."""
    from filelock import FileLock

    from calib.models.gguf import cache_root, convert_gguf

    # Workers of pytest-xdist wait for the first one instead of converting side by side.
    with FileLock(cache_root() / "assets" / ".smollm2.lock"):
        return convert_gguf(smollm2_gguf)


@pytest.fixture(scope="session")
def minilm(fetch_asset: Any) -> Path:
    """Folder of all-MiniLM-L6-v2 (BertModel, float32 safetensors, tokenizer)."""
    return fetch_asset("minilm")


@pytest.fixture(scope="session")
def rxnmapper(fetch_asset: Any) -> Path:
    """Folder of an ALBERT masked LM over reaction SMILES: pickled weights, shared layers, no usable tokenizer."""
    return fetch_asset("rxnmapper")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LlamaForCausalLM: 3 layers, width 64, 4 heads on 2 key/value heads, 300 tokens, tied, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    return _save(LlamaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT2LMHeadModel (Conv1D, LayerNorm with bias, learned positions): 2 layers, width 64, tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _byte_level_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _save(GPT2LMHeadModel, config, tokenizer, tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BertForMaskedLM (bidirectional, no pooler): 2 layers, width 64, about 120 word pieces."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = _word_piece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return _save(BertForMaskedLM, config, tokenizer, tmp_path_factory.mktemp("tiny_bert"))


def _save(cls: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text: 4 special tokens, 256 bytes, 40 merges, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer: Tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    assert tokenizer.get_vocab_size() == 300
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def _word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-piece tokenizer with BERT's special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer: Tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
