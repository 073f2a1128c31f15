# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: rows, prefixes, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from calib.corpus import TokenBlocks, build_blocks
from calib.errors import ArtifactError, ModelError, UsageError
from calib.evaluation.evaluate import evaluate
from calib.evaluation.language import compare_tokens
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel, plan_from_scales
from calib.scales import choose_scales
from calib.schema.evaluation import EvaluationFile
from calib.schema.scales import CureRecord, ScaleFile


def setting(folder: Path, domain: str = "builtin:speeches") -> tuple[OpenedModel, ScaleFile, TokenBlocks]:
    opened = open_model(folder, device="cpu", dtype="float32")
    blocks = build_blocks([domain], opened.tokenizer, samples=8, max_length=32)
    held_out = build_blocks([domain], opened.tokenizer, samples=4, max_length=32, seed=5)
    return opened, choose_scales(measure(opened, blocks, MeasureOptions())), held_out


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    return setting(tiny_llama)


@pytest.fixture(scope="module")
def found(llama: Any) -> EvaluationFile:
    opened, scales, blocks = llama
    return evaluate(opened, blocks, scales)


def with_cure(scales: ScaleFile, **record: Any) -> ScaleFile:
    return scales.model_copy(update={"cures": [CureRecord(summary="for a test", **record)]})


def test_every_form_has_a_row_with_the_figures_of_its_own_plan(llama: Any, found: EvaluationFile) -> None:
    opened, scales, blocks = llama
    assert [row.label for row in found.rows] == ["float", "weights only", "dynamic per-token", "static"]
    for row in found.rows[1:]:
        plan = plan_from_scales(opened.model, scales, inputs=row.inputs)
        reference, scores = compare_tokens(
            opened.model, blocks.input_ids, lambda plan=plan: QuantizedModel(opened.model, plan)
        )
        assert row.perplexity == pytest.approx(scores.perplexity, rel=1e-6)
        assert found.rows[0].perplexity == pytest.approx(reference.perplexity, rel=1e-6)
        assert row.ratio is not None
        assert row.ratio.low <= row.ratio.value <= row.ratio.high
        assert row.ratio.value == pytest.approx(scores.perplexity / reference.perplexity, rel=1e-6)
        assert row.kl is not None
        assert row.kl.value == pytest.approx(scores.kl.mean(), rel=1e-4)
        assert row.top1 is not None
        assert row.top1.value == pytest.approx(scores.top1.mean())
        assert row.silent == []


def test_an_evaluation_is_repeatable_and_survives_json(llama: Any, found: EvaluationFile) -> None:
    opened, scales, blocks = llama
    again = evaluate(opened, blocks, scales)
    assert again.model_dump_json() == found.model_dump_json()
    assert EvaluationFile.model_validate_json(found.model_dump_json()) == found
    assert found.measurement_sha256 == scales.measurement_sha256


def test_layers_are_of_the_last_row_and_name_the_worst(found: EvaluationFile) -> None:
    assert found.layers is not None
    assert (found.layers.label, found.layers.blocks) == ("static", 2)
    running = {t.name: t.running_sqnr_db for t in found.layers.tensors if t.running_sqnr_db is not None}
    assert running[found.layers.worst[0]] == min(running.values())
    assert "lm_head" in found.left_out


def test_without_scales_nothing_is_static(llama: Any) -> None:
    opened, _, blocks = llama
    found = evaluate(opened, blocks, layer_blocks=0)
    assert [row.inputs for row in found.rows] == ["float", "none", "dynamic-per-token"]
    assert found.layers is None
    assert found.measurement_sha256 is None
    with pytest.raises(UsageError, match="scale file"):
        evaluate(opened, blocks, inputs=["static"])


def test_rounded_keys_and_values_cost_more_and_are_named(llama: Any, found: EvaluationFile) -> None:
    opened, scales, blocks = llama
    with_cache = evaluate(opened, blocks, scales, inputs=["static"], kv_cache="static", kv_bits=3, layer_blocks=1)
    row, plain = with_cache.rows[-1], found.rows[-1]
    assert row.label == "static, keys and values static"
    assert row.kl is not None
    assert plain.kl is not None
    assert row.kl.value > 2 * plain.kl.value
    assert with_cache.layers is not None
    assert any(t.name.endswith("self_attn:key") for t in with_cache.layers.tensors)


def test_a_prefix_is_in_context_in_float_and_the_ratio_is_to_float_with_it(llama: Any, found: EvaluationFile) -> None:
    opened, scales, blocks = llama
    prefix = [7, 9]
    cured = evaluate(opened, blocks, with_cure(scales, kind="prefix", needs="prefix", settings={"token_ids": prefix}))
    plain, reference, *_, static = cured.rows
    assert (plain.label, plain.prefix) == ("float, no prefix", [])
    assert plain.perplexity == pytest.approx(found.rows[0].perplexity, rel=1e-5)
    assert (reference.label, reference.prefix) == ("float, with the prefix", prefix)
    rows = np.concatenate([np.broadcast_to(prefix, (len(blocks), 2)), blocks.input_ids], 1)

    def perplexity() -> float:
        with torch.no_grad():
            logits = opened.model(input_ids=torch.from_numpy(rows)).logits[:, 2:-1].double().numpy()
        picked = np.take_along_axis(log_softmax(logits, -1), rows[:, 3:, None], -1)
        return float(np.exp(-picked.mean()))

    assert reference.perplexity == pytest.approx(perplexity(), rel=1e-5)
    with QuantizedModel(opened.model, plan_from_scales(opened.model, scales, skip_positions=2)):
        assert static.perplexity == pytest.approx(perplexity(), rel=1e-5)
    assert static.ratio is not None
    assert static.perplexity is not None
    assert static.ratio.value == pytest.approx(static.perplexity / reference.perplexity, rel=1e-6)
    assert cured.layers is not None
    assert len(cured.layers.tensors) == len(found.layers.tensors)


@pytest.mark.parametrize(
    ("record", "error", "says"),
    [
        ({"kind": "prefix", "settings": {"token_ids": [300]}}, ArtifactError, "300 is outside of the vocabulary"),
        ({"kind": "prefix", "settings": {"token_ids": [-1]}}, ArtifactError, "-1 is outside of the vocabulary"),
        ({"kind": "prefix", "settings": {}}, ArtifactError, "token_ids None"),
        ({"kind": "rotate", "needs": "online-op"}, UsageError, "cure rotate"),
    ],
)
def test_a_cure_that_cannot_be_followed_is_refused(
    llama: Any, record: dict[str, Any], error: type[Exception], says: str
) -> None:
    opened, scales, blocks = llama
    with pytest.raises(error, match=says):
        evaluate(opened, blocks, with_cure(scales, **record))


def test_scales_of_another_checkpoint_are_refused(llama: Any, tiny_gpt2: Path) -> None:
    _, scales, blocks = llama
    with pytest.raises(ArtifactError, match="another model"):
        evaluate(open_model(tiny_gpt2, device="cpu"), blocks, scales)


def test_calibration_data_and_another_dtype_are_noted(llama: Any, found: EvaluationFile) -> None:
    opened, scales, blocks = llama
    assert any("texts of the calibration data" in note for note in found.notes)
    same = scales.model_copy(update={"corpus": blocks.provenance})
    notes = evaluate(opened, blocks, same, inputs=["none"], layer_blocks=0).notes
    assert any("are the calibration data" in note for note in notes)
    other = replace(opened, provenance=opened.provenance.model_copy(update={"dtype": "bfloat16"}))
    assert any("float32" in n and "bfloat16" in n for n in evaluate(other, blocks, scales, inputs=["none"]).notes)


def test_an_encoder_is_compared_by_what_it_predicts(tiny_bert: Path) -> None:
    opened, scales, blocks = setting(tiny_bert)
    found = evaluate(opened, blocks, scales)
    with torch.no_grad(), QuantizedModel(opened.model, plan_from_scales(opened.model, scales)):
        rounded = opened.model(input_ids=torch.from_numpy(blocks.input_ids)).logits.double()
    with torch.no_grad():
        exact = opened.model(input_ids=torch.from_numpy(blocks.input_ids)).logits.double()
    static = found.rows[-1]
    assert static.perplexity is None
    assert static.top1 is not None
    assert static.top1.value == pytest.approx((exact.argmax(-1) == rounded.argmax(-1)).double().mean().item())
    expected = 10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum())
    assert static.sqnr_db == pytest.approx(expected.item(), abs=0.01)
    with pytest.raises(UsageError, match="no language model"):
        evaluate(opened, blocks, with_cure(scales, kind="prefix", settings={"token_ids": [1]}))


def test_both_halves_of_an_encoder_decoder_read_the_block(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(0)
    words = open_model(tiny_bert, device="cpu", dtype="float32").model.config.vocab_size
    config = T5Config(
        vocab_size=words, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    opened, scales, blocks = setting(tmp_path)
    found = evaluate(opened, blocks, scales)
    ids = torch.from_numpy(blocks.input_ids)
    with torch.no_grad():
        exact = opened.model(input_ids=ids, decoder_input_ids=ids).logits.double()
        with QuantizedModel(opened.model, plan_from_scales(opened.model, scales)) as quantized:
            rounded = opened.model(input_ids=ids, decoder_input_ids=ids).logits.double()
    assert not quantized.silent()
    expected = 10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum())
    assert found.rows[-1].sqnr_db == pytest.approx(expected.item(), abs=0.01)
    assert any("decoder reads the same tokens" in note for note in found.notes)
    assert found.layers is not None


def test_embeddings_are_compared_by_their_cosine(tiny_bert: Path) -> None:
    opened, _, blocks = setting(tiny_bert)
    encoder = replace(opened, model=opened.model.bert, task="feature-extraction")
    row = evaluate(encoder, blocks, inputs=["dynamic-per-token"]).rows[-1]
    ids = torch.from_numpy(blocks.input_ids)
    with torch.no_grad():
        exact = encoder.model(input_ids=ids).last_hidden_state.mean(1)
        with QuantizedModel(encoder.model, plan_from_scales(encoder.model, inputs="dynamic-per-token")):
            rounded = encoder.model(input_ids=ids).last_hidden_state.mean(1)
    assert row.cosine is not None
    assert row.cosine.value == pytest.approx(torch.cosine_similarity(exact, rounded).mean().item(), abs=1e-6)
    assert row.cosine.value < 1
    assert row.top1 is None


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_bert"])
def test_blocks_that_are_longer_than_the_context_are_named(name: str, request: pytest.FixtureRequest) -> None:
    opened = open_model(request.getfixturevalue(name), device="cpu", dtype="float32")
    longest = opened.model.config.max_position_embeddings
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=longest + 1)
    with pytest.raises(ModelError, match=rf"token ids \d x {longest + 1} .*check --max-length"):
        evaluate(opened, blocks, batch_size=2)
