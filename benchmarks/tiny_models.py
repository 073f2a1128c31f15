# SPDX-License-Identifier: Apache-2.0
"""Any architecture of transformers in miniature: a configuration of small sizes with random weights, and inputs for it.

Sizes are set by walking the configuration: what a field is follows from its name and its default. Where a class needs
numbers that fit each other in its own way, `OVERRIDES` has them; nothing here tells calib anything.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

VOCABULARY, ROWS, TOKENS, LAYERS = 160, 2, 12, 2
_EXACT = {
    "vocab_size": VOCABULARY, "head_dim": 16, "d_kv": 16, "d_head": 16, "kv_channels": 16, "attention_head_dim": 16,
    "global_head_dim": 16, "swa_head_dim": 16, "swa_v_head_dim": 16, "text_vocab_size": VOCABULARY,
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "num_labels": 3, "max_position_embeddings": 128,
    "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "seq_length": 128, "max_source_positions": 32,
    "max_target_positions": 64, "sliding_window": 8, "attention_window": 8, "window_size": 4, "block_size": 8,
    "q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 16, "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "conv_kernel": 4,
    "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "n_groups": 1, "mamba_n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_top_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "linear_head_dim": 16,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "rotary_dim": 4, "type_vocab_size": 2, "embedding_size": 64,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_channels": 3, "in_channels": 3,
    "in_chans": 3, "lm_head_rank": 8, "decoder_start_token_id": 1,
}  # fmt: skip
_PATTERNS: tuple[tuple[str, int], ...] = (
    (r"(num|n)_?(key_value|kv)_heads|num_key_value_heads|.*_kv_heads|.*num_key_value_heads", 2),
    (r".*(attention_heads|_heads|n_head)", 4),
    (r".*(num|n)_(hidden_)?layers?|.*num_.*_layers|n_layer|.*_layers|depth|num_.*blocks", LAYERS),
    (r"(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|emb_dim|projection_dim|.*_hidden_size|.*_embed_dim)", 64),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|expert_dim|feed_forward_size|intermediate_dim)", 96),
)
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "esmc": {"num_key_value_heads": 4},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 32], "axial_pos_embds_dim": [32, 32]},
    "ReformerForMaskedLM": {"is_decoder": False},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "xlstm": {"embedding_dim": 64, "hidden_size": 64},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "zamba2": {"attention_head_dim": 32, "attention_hidden_size": 128, "layers_block_type": ["mamba", "hybrid"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "glm46v": {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "glm_ocr": {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}},
    "glm4v": {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}},
    "deepseek_v4": {"compress_ratios": [2, 2]},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"fullatt_block_indexes": [1], "window_size": 32},
    },
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_vl_moe": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_omni_moe_thinker": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "perceiver": {"num_latents": 8, "d_latents": 64, "d_model": 64, "qk_channels": 64, "v_channels": 64},
    "swin": {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6]},
    "swinv2": {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6]},
    "donut-swin": {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6]},
    "gemma3": {"mm_tokens_per_image": 4},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "siglip2_vision_model": {"hidden_size": 64},
    "ministral": {"head_dim": 16},
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with small sizes, also in the configurations inside of it."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and all(isinstance(key, str) for key in value) and name != "per_layer_config":
            small[name] = shrink(value)
        elif isinstance(value, bool) or value is None:
            small[name] = value
        elif isinstance(value, int):
            small[name] = _small(name, value)
        else:
            small[name] = value
    depth = config.get("num_hidden_layers") or config.get("n_layer")
    small = {name: _short(name, value, depth) for name, value in small.items()}
    if config.get("qk_rope_head_dim") and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    if config.get("kv_lora_rank") is not None and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _short(name: str, value: Any, depth: int | None) -> Any:
    """Lists that have an entry per layer, or whose sum or names follow from the sizes."""
    if name in ("out_features", "out_indices", "stage_names"):
        return None
    if name == "image_grid_pinpoints":
        return [[32, 32]]
    if name == "mrope_section":
        return [2, 3, 3]
    if name == "per_layer_config" and isinstance(value, dict):
        return {key: kept for key, kept in value.items() if int(key) < LAYERS}
    return _kinds(value, LAYERS) if isinstance(value, list) and value and len(value) == depth else value


def _small(name: str, value: int) -> int:
    if name.endswith(("token_id", "token_index")):
        return value if 0 <= value < VOCABULARY - 40 else VOCABULARY - 40 + sum(name.encode()) % 40
    if name in _EXACT:
        return min(value, _EXACT[name]) if value > 0 else value
    for pattern, size in _PATTERNS:
        if re.fullmatch(pattern, name):
            return min(value, size) if value > 0 else value
    return value


def _kinds(layers: list[Any], number: int) -> list[Any]:
    """That many entries that show every kind there is, as far as they go."""
    kinds = list(dict.fromkeys(layers))
    return (kinds + [layers[0]] * number)[:number]


def tiny_config(config_class: Any, class_name: str = "") -> Any:
    """A small configuration of a class."""
    default = config_class()
    values = shrink(default.to_dict())
    values.pop("model_type", None)
    for name in (config_class.model_type, class_name):
        _merge(values, OVERRIDES.get(name, {}))
    return config_class.from_dict(values)


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def build(class_name: str, model_type: str) -> nn.Module:
    """The model, in evaluation mode, float32, always with the same weights."""
    import transformers

    cls = getattr(transformers, class_name)
    config_class = cls.config_class or type(transformers.AutoConfig.for_model(model_type))
    torch.manual_seed(0)
    return cls(tiny_config(config_class, class_name)).float().eval()


def inputs_of(model: Any, task: str) -> list[dict[str, Any]]:
    """Inputs to try, the best first: a model takes what its forward names."""
    generator = torch.Generator().manual_seed(1)

    def ids(tokens: int = TOKENS) -> torch.Tensor:
        return torch.randint(3, VOCABULARY - 41, (ROWS, tokens), generator=generator)

    text = {"input_ids": ids()}
    both = {**text, "decoder_input_ids": ids(TOKENS - 3)}
    if task in ("causal", "masked"):
        crossed = {**text, "encoder_hidden_states": torch.randn(ROWS, TOKENS - 3, 64, generator=generator)}
        attends = any("encoder_attn" in n or "cross_att" in n or "crossatt" in n for n, _ in model.named_modules())
        return [crossed, text] if attends else [text, both]
    if task == "seq2seq":
        return [both]
    if task == "image":
        return [{"pixel_values": _pixels(model, generator)}]
    if task == "speech":
        mels = _field(model, "num_mel_bins", _field(model, "input_feat_per_channel", 16))
        frames = 2 * _field(model, "max_source_positions", 32)
        decoder = {"decoder_input_ids": ids(6)}
        return [
            {"input_features": torch.randn(ROWS, mels, frames, generator=generator), **decoder},
            {"input_features": torch.randn(ROWS, frames, mels, generator=generator), **decoder},
            {"input_values": torch.randn(ROWS, 4000, generator=generator), **decoder},
        ]
    return [*_with_images(model, generator), text]


def _field(model: Any, name: str, default: int) -> int:
    for config in _configs(model.config):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _configs(config: Any) -> list[Any]:
    inner = [getattr(config, name, None) for name in ("vision_config", "audio_config", "text_config", "encoder")]
    return [config, *(c for c in inner if c is not None and not isinstance(c, dict))]


def _pixels(model: Any, generator: torch.Generator) -> torch.Tensor:
    size = next((s for c in _configs(model.config) if (s := getattr(c, "image_size", None)) is not None), 32)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(ROWS, _field(model, "num_channels", 3), height, width, generator=generator)


def _with_images(model: Any, generator: torch.Generator) -> list[dict[str, Any]]:
    """Text with an image per row, whose placeholder tokens are as many as the model makes features of it."""
    token = next((t for n in ("image_token_id", "image_token_index") if (t := getattr(model.config, n, None))), None)
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return []
    plain = {"pixel_values": _pixels(model, generator)}
    sizes = {**plain, "image_sizes": torch.full((ROWS, 2), plain["pixel_values"].shape[-1])}
    patch, merge = getattr(vision, "patch_size", 8), getattr(vision, "spatial_merge_size", 2)
    width = 3 * patch * patch * getattr(vision, "temporal_patch_size", 2) if isinstance(patch, int) else 0
    grid = {
        "pixel_values": torch.randn(ROWS * 4 * merge * merge, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * merge, 2 * merge]] * ROWS),
    }
    found = []
    several = [
        {**images, "pixel_values": plain["pixel_values"][:, None].repeat(1, number, 1, 1, 1)}
        for number in (1, 2)
        for images in (plain, sizes)
    ]
    for images in (plain, grid, sizes, *several):
        count = _features(model, images)
        tokens = torch.randint(3, VOCABULARY - 41, (ROWS, TOKENS + (count or 0)), generator=generator)
        if count and token is not None:
            tokens[:, 3 : 3 + count] = token
        if count or token is None:
            kinds = (tokens == token).to(torch.int64) if token is not None else torch.zeros_like(tokens)
            found += [{"input_ids": tokens, **images}, {"input_ids": tokens, **images, "mm_token_type_ids": kinds}]
    return found


def _features(model: Any, images: dict[str, Any]) -> int | None:
    """How many features per row a model makes of images; None if it does not take them in this form."""
    getter = getattr(model, "get_image_features", None)
    if getter is None:
        return None
    try:
        with torch.no_grad():
            made = getter(**images)
    except Exception:  # any model's own way to refuse
        return None
    made = getattr(made, "pooler_output", made)
    while isinstance(made, tuple | list):
        if isinstance(made[0], torch.Tensor) and made[0].ndim == 2 and len(made) == ROWS:
            return int(made[0].shape[0])
        made = made[0]
    if not isinstance(made, torch.Tensor):
        return None
    return int(made.shape[-2]) if made.ndim == 3 else int(made.shape[0]) // ROWS
