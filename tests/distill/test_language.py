# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.distill.cmi import measure_information
from calib.distill.grouping import BYTES_PER_ENTRY, frequent_rows
from calib.distill.information import ClassInformation
from calib.distill.language import block_loader, language_information, next_token_counts
from calib.distill.optimiser import OptimiserSettings
from calib.distill.student import StudentSettings, train_student
from calib.distill.task import CausalLanguageTask
from calib.distill.teacher import TeacherSettings, fine_tune, fine_tune_with_control
from calib.errors import UsageError
from calib.models import OpenedModel, open_model

COUNTS = torch.tensor([500, 3, 80, 0, 60, 10, 7, 2, 1, 49])


@pytest.fixture(scope="module")
def opened(tiny_llama: Path) -> OpenedModel:
    return open_model(tiny_llama, device="cpu")


@pytest.fixture(scope="module")
def blocks(opened: OpenedModel) -> TokenBlocks:
    return build_blocks(["builtin:speeches"], opened.tokenizer, samples=24, max_length=32)


def test_frequent_tokens_have_a_row_each_and_the_others_share_by_frequency() -> None:
    found = frequent_rows(COUNTS, buckets=2)
    assert found.rows == 3 + 2
    assert found.row_of_label[[0, 2, 4]].tolist() == [0, 1, 2]
    rest = found.row_of_label[[9, 5, 6, 1, 7, 8, 3]]
    assert rest.tolist() == sorted(rest.tolist())
    assert set(rest.tolist()) == {3, 4}
    assert found.own_share == pytest.approx(640 / 712)


def test_rows_stay_within_the_memory() -> None:
    found = frequent_rows(COUNTS, buckets=2, memory_bytes=4 * BYTES_PER_ENTRY * 10)
    assert found.rows == 4
    assert found.memory_bytes == 4 * BYTES_PER_ENTRY * 10
    assert found.row_of_label[0] == 0
    with pytest.raises(UsageError, match="allow more"):
        frequent_rows(COUNTS, buckets=2, memory_bytes=2 * BYTES_PER_ENTRY * 10)


def test_rare_rows_lean_on_the_mean_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 4, generator=generator), torch.tensor([0] * 36 + [1] * 4)
    grouping = replace(frequent_rows(torch.tensor([36, 4, 0, 0]), min_count=1, buckets=1), shrinkage=4.0)
    information = ClassInformation(4, rows=grouping.rows, row_of_label=grouping.row_of_label, separation=False)
    information.update(logits, labels)
    p = torch.softmax(logits.double(), 1)
    everything = p.mean(0)
    rows = grouping.shrunk(information)
    torch.testing.assert_close(rows[0], (36 * p[:36].mean(0) + 4 * everything) / 40)
    torch.testing.assert_close(rows[1], (4 * p[36:].mean(0) + 4 * everything) / 8)
    torch.testing.assert_close(rows[2], everything)


def test_the_cmi_of_a_language_model_is_bounded_from_above(opened: OpenedModel, blocks: TokenBlocks) -> None:
    found, grouping = language_information(opened.model, blocks, min_count=20, buckets=4)
    exact = measure_information(opened.model, block_loader(blocks), task=CausalLanguageTask())[0].summary()
    summary = found[0].summary()
    assert summary.grouped
    assert summary.samples == 24 * 31 == int(next_token_counts(blocks, 300).sum())
    assert summary.cmi >= exact.cmi - 1e-12
    assert summary.log_likelihood == pytest.approx(exact.log_likelihood)
    assert 0 < grouping.own_share < 1


def test_padding_is_neither_counted_nor_predicted(opened: OpenedModel) -> None:
    padded = build_blocks(["builtin:speeches"], opened.tokenizer, samples=3, max_length=4096, layout="documents")
    cut = replace(padded, input_ids=padded.input_ids[:, :16], lengths=padded.lengths.clip(max=16) * 0 + [16, 9, 4])
    counts = next_token_counts(cut, 300)
    assert int(counts.sum()) == 15 + 8 + 3
    found = measure_information(opened.model, block_loader(cut), task=CausalLanguageTask())[0]
    assert found.samples == 26


def test_a_language_teacher_is_fine_tuned_over_shared_rows_and_teaches(tiny_llama: Path, blocks: TokenBlocks) -> None:
    model, student = (open_model(tiny_llama, device="cpu").model for _ in range(2))
    loader = block_loader(blocks, batch_size=8, shuffle=True)
    fast = OptimiserSettings("adamw", 3e-3, schedule="constant")
    train_student(model, None, loader, "ce", StudentSettings(epochs=10, optimiser=fast), task=CausalLanguageTask())
    grouping = frequent_rows(next_token_counts(blocks, 300), min_count=8, buckets=4)
    settings = TeacherSettings(strength=0.5, epochs=4, optimiser=replace(fast, learning_rate=1e-3))
    result = fine_tune_with_control(model, loader, settings, task=CausalLanguageTask(), grouping=grouping)
    assert result.control is not None
    assert result.mcmi.stopped is None
    assert result.mcmi.after.cmi > result.control.after.cmi
    before = measure_information(student, loader, task=CausalLanguageTask())[0].summary().log_likelihood
    train_student(student, model, loader, "kd", StudentSettings(epochs=3, optimiser=fast), task=CausalLanguageTask())
    after = measure_information(student, loader, task=CausalLanguageTask())[0].summary().log_likelihood
    assert after > before + 0.3
    with pytest.raises(UsageError, match="shared rows"):
        fine_tune(model, loader, replace(settings, refresh="ema"), balanced=loader, grouping=grouping)
