# SPDX-License-Identifier: Apache-2.0
"""The cured model again, from its parent and what was recorded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.cures import (
    OfflineRotation,
    OnlineRotation,
    Smoothing,
    SmoothingSweep,
    find_pairs,
    save_smoothing,
    smoothing_record,
)
from calib.cures.restore import SMOOTHING_FILE, restore_cures, rounded_weights
from calib.errors import ArtifactError, ModelError
from calib.measurement.engine import MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.scales import choose_scales
from calib.schema.scales import CureRecord, ScaleFile


@dataclass
class Case:
    folder: Path
    blocks: TokenBlocks
    smoothing: Smoothing
    rotation: OnlineRotation
    scales: ScaleFile  # of the cured model
    logits: torch.Tensor  # of the same
    weights: dict[str, torch.Tensor]


def fresh(folder: Path) -> OpenedModel:
    return open_model(folder, device="cpu", dtype="float32")


def logits(opened: OpenedModel, blocks: TokenBlocks) -> torch.Tensor:
    with torch.no_grad():
        return opened.model(input_ids=torch.from_numpy(blocks.input_ids)).logits


@pytest.fixture(scope="module")
def case(tiny_llama: Path) -> Case:
    opened = fresh(tiny_llama)
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=4, max_length=32)
    measurement = measure(opened, blocks, MeasureOptions())
    smoothing = SmoothingSweep(find_pairs(opened.model), measurement).smoothing(0.6)
    rotation = OnlineRotation.by_role(opened.model, signs_seed=3)
    prefix = CureRecord(kind="prefix", summary="for a test", needs="prefix", settings={"token_ids": [5]})
    records = [prefix, smoothing_record(smoothing), rotation.record()]
    smoothing.apply(opened.model)
    rotation.apply(opened.model)
    opened = opened.cured([record.model_dump_json() for record in records])
    scales = choose_scales(measure(opened, blocks, MeasureOptions())).model_copy(update={"cures": records})
    weights = copy.deepcopy(opened.model.state_dict())
    return Case(tiny_llama, blocks, smoothing, rotation, scales, logits(opened, blocks), weights)


def test_a_restored_model_is_the_cured_one_bit_by_bit(case: Case, tmp_path: Path) -> None:
    save_smoothing(case.smoothing, tmp_path / SMOOTHING_FILE)
    restored = restore_cures(fresh(case.folder), case.scales, tmp_path)
    assert restored.provenance.fingerprint == case.scales.model.fingerprint
    assert torch.equal(logits(restored, case.blocks), case.logits)
    state = restored.model.state_dict()
    assert all(torch.equal(value, case.weights[name]) for name, value in state.items())
    plain = fresh(case.folder).model.state_dict()
    assert not torch.equal(state["model.layers.0.mlp.down_proj.weight"], plain["model.layers.0.mlp.down_proj.weight"])


def test_a_model_with_rotated_weights_is_restored_bit_by_bit(tiny_llama: Path, tmp_path: Path) -> None:
    opened = fresh(tiny_llama)
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=4, max_length=32)
    rotation = OfflineRotation.find(opened.model, find_pairs(opened.model), untie=True, seed=7)
    rotation.apply(opened.model)
    opened = opened.cured([rotation.record().model_dump_json()])
    scales = choose_scales(measure(opened, blocks, MeasureOptions())).model_copy(update={"cures": [rotation.record()]})
    restored = restore_cures(fresh(tiny_llama), scales, tmp_path)
    state, expected = restored.model.state_dict(), opened.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert not restored.model.config.tie_word_embeddings


def test_another_rotation_than_was_recorded_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    opened = fresh(tiny_llama)
    record = OfflineRotation.find(opened.model, find_pairs(opened.model), untie=True).record()
    record = record.model_copy(update={"settings": {**record.settings, "heads": ["model.layers.9.self_attn.v_proj"]}})
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=16)
    provenance = opened.cured([record.model_dump_json()]).provenance
    scales = choose_scales(measure(opened, blocks, MeasureOptions()))
    scales = scales.model_copy(update={"cures": [record], "model": provenance})
    with pytest.raises(ModelError, match="another way than was recorded"):
        restore_cures(opened, scales, tmp_path)


def test_scales_of_the_model_itself_change_nothing(case: Case, tmp_path: Path) -> None:
    opened = fresh(case.folder)
    scales = choose_scales(measure(opened, case.blocks, MeasureOptions()))
    assert restore_cures(opened, scales, tmp_path) is opened


def test_another_parent_is_refused_and_untouched(case: Case, tiny_gpt2: Path, tmp_path: Path) -> None:
    save_smoothing(case.smoothing, tmp_path / SMOOTHING_FILE)
    opened = fresh(tiny_gpt2)
    before = copy.deepcopy(opened.model.state_dict())
    with pytest.raises(ArtifactError, match="another model"):
        restore_cures(opened, case.scales, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in opened.model.state_dict().items())


def test_a_missing_or_another_smoothing_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=SMOOTHING_FILE):
        restore_cures(fresh(case.folder), case.scales, tmp_path)
    opened = fresh(case.folder)
    other = SmoothingSweep(find_pairs(opened.model), measure(opened, case.blocks, MeasureOptions())).smoothing(0.7)
    save_smoothing(other, tmp_path / SMOOTHING_FILE)
    with pytest.raises(ArtifactError, match="not the smoothing of these scales"):
        restore_cures(opened, case.scales, tmp_path)


def test_a_rotation_of_something_else_is_refused(case: Case, tmp_path: Path) -> None:
    opened = fresh(case.folder)
    record = CureRecord(kind="rotate", summary="for a test", settings={"where": "residual"})
    provenance = opened.cured([record.model_dump_json()]).provenance
    scales = case.scales.model_copy(update={"cures": [record], "model": provenance})
    with pytest.raises(ArtifactError, match="rotation of weights or inputs"):
        restore_cures(opened, scales, tmp_path)


def test_compensated_weights_whose_file_is_missing_are_not_rounded_anew_in_silence(case: Case, tmp_path: Path) -> None:
    assert rounded_weights(case.scales, tmp_path) is None
    settings = {"order": "activation", "rounded_sha256": {"model.layers.0.mlp.down_proj": "0" * 64}}
    record = CureRecord(kind="compensate", summary="for a test", settings=settings)
    scales = case.scales.model_copy(update={"cures": [*case.scales.cures, record]})
    with pytest.raises(ArtifactError, match=r"rounded_weights\.safetensors: is no readable"):
        rounded_weights(scales, tmp_path)
