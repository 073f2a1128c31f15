# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import torch

from calib.models import open_model


def test_smollm2_is_opened_from_its_gguf_file_and_knows_the_capital_of_france(
    smollm2: Path, smollm2_gguf: Path
) -> None:
    opened = open_model(smollm2_gguf, device="cpu")
    assert opened.folder == smollm2
    assert opened.tokenizer is not None
    provenance = opened.provenance
    assert (provenance.architecture, provenance.task) == ("LlamaForCausalLM", "text-generation")
    assert (provenance.source_format, provenance.dtype) == ("gguf:Q4_1", "float32")
    assert provenance.parameters == 134_515_008
    ids = opened.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = opened.model(ids).logits[0, -1].argmax()
    assert opened.tokenizer.decode(best) == " Paris"


def test_minilm_finds_like_sentences_alike(minilm: Path) -> None:
    opened = open_model(minilm, device="cpu")
    assert opened.tokenizer is not None
    assert (opened.provenance.architecture, opened.provenance.parameters) == ("BertModel", 22_713_216)
    sentences = ["The ship sailed across the sea.", "A vessel crossed the ocean.", "Interest rates rose again."]
    batch = opened.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = opened.model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similar, different = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert similar > 0.6
    assert different < 0.3
