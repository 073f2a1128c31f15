# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny models that see, hear and translate, each with a processor, and pictures and sound for them."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from benchmarks import tiny_models

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %};{% endfor %}"
)


def tokenizer(named: dict[int, str], **special: str) -> PreTrainedTokenizerFast:
    """One token per character, 160 in all, and special ones at given ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [*" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-"]
    free = [i for i in range(3, tiny_models.VOCABULARY) if i not in named]
    vocabulary = {text: i for i, text in named.items()}
    vocabulary |= dict(zip(characters, free, strict=False))
    used = set(vocabulary.values())
    vocabulary |= {f"<{i}>": i for i in range(tiny_models.VOCABULARY) if i not in used}
    core: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.add_special_tokens(list(named.values()))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<0>", pad_token="<0>", eos_token="<2>", **special)


def save(class_name: str, model_type: str, processor: Any, folder: Path, **config: Any) -> Path:
    model: Any = tiny_models.build(class_name, model_type)
    for name, value in config.items():
        setattr(model.config, name, value)
        if model.can_generate():
            setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    from transformers import ViTImageProcessorPil

    return save("ViTForImageClassification", "vit", ViTImageProcessorPil(size={"height": 32, "width": 32}), folder)


def clip(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save("CLIPModel", "clip", CLIPProcessor(pictures, tokenizer({})), folder)


def llava(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pictures,
        tokenizer({146: "<image>"}, extra_special_tokens={"image_token": "<image>"}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return save("LlavaForConditionalGeneration", "llava", processor, folder)


def qwen2_5_vl(folder: Path) -> Path:
    """Without a processor of videos, which needs torchvision."""
    from transformers import Qwen2VLImageProcessorPil

    small = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    named = {135: "<|image_pad|>", 155: "<|video_pad|>", 137: "<|vision_start|>", 130: "<|vision_end|>"}
    pictures = Qwen2VLImageProcessorPil(**small, size={"shortest_edge": 256, "longest_edge": 4096})
    save("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", pictures, folder)
    tokenizer(named).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def whisper(folder: Path) -> Path:
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer  # noqa: F401

    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=250)
    save("WhisperForConditionalGeneration", "whisper", extractor, folder, begin_suppress_tokens=None)
    tokenizer({159: "<start>", 147: "<end>"}).save_pretrained(folder)
    return folder


def qwen2_audio(folder: Path) -> Path:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    named = {121: "<|AUDIO|>", 150: "<|audio_bos|>", 151: "<|audio_eos|>"}
    template = CHAT.replace("{% if p['type'] == 'image' %}IMAGE", "{% if p['type'] == 'audio' %}AUDIO")
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=250),
        tokenizer(named),
        chat_template=template.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
    )
    return save("Qwen2AudioForConditionalGeneration", "qwen2_audio", processor, folder)


def t5(folder: Path) -> Path:
    return save("T5ForConditionalGeneration", "t5", tokenizer({}), folder, decoder_start_token_id=0, eos_token_id=2)


def bart(folder: Path) -> Path:
    ends = {"decoder_start_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
    return save("BartForConditionalGeneration", "bart", tokenizer({}), folder, **ends)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pil(path: Path) -> Any:
    """A picture as processors take it."""
    from PIL import Image

    return Image.open(path).convert("RGB")


def sound(path: Path, seed: int = 0, rate: int = 16000, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, 5000, int(rate * seconds)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
