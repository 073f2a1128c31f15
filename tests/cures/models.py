# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many families, made from their configuration in milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from calib.cures import Pairs, find_pairs

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FALCON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA_LIKE),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA_LIKE, "head_dim": 16}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": True, "bias": True}),
    "falcon_grouped": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon_heads": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA_LIKE),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": 32}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 4}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**LLAMA_LIKE, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", LLAMA_LIKE),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA_LIKE),
    "olmo_clip": ("OlmoForCausalLM", "OlmoConfig", {**LLAMA_LIKE, "clip_qkv": 8.0}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 300,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 300, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """One of `MODELS`, float32, in evaluation mode, with norms and biases that are not all 1 and 0."""
    import transformers

    cls, config, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model


@cache
def pairs_of(name: str) -> Pairs:
    """The pairs of one of `MODELS`; they hold names and numbers, so they serve every model of that name."""
    return find_pairs(build(name))


def logits(model: Any) -> torch.Tensor:
    """Logits of 40 fixed tokens, float32 ``[1, 40, vocabulary]``."""
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(5))
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, **more).logits
    return result


def loud_norms(model: Any) -> None:
    """Makes channels of a Llama's norms a hundred times larger, and undoes that in what reads them."""
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[:3] *= 100
                for reader in readers:
                    reader.weight[:, :3] /= 100


def spiked(model: Any) -> None:
    """Makes a few channels of what down_proj reads a hundred times larger: INT8 without a cure loses the others."""
    for block in model.model.layers:
        with torch.no_grad():
            block.mlp.up_proj.weight[:3] *= 100
            block.mlp.down_proj.weight[:, :3] /= 100
