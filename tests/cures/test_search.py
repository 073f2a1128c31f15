# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from calib.corpus import TokenBlocks, build_blocks
from calib.cures import SmoothingSweep, find_pairs
from calib.cures.candidate import Candidate
from calib.cures.judge import Judge, Score
from calib.cures.offline import OfflineRotation
from calib.cures.prefix import find_prefixes
from calib.cures.ranges import smoothed_ranges
from calib.cures.result import CureOptions
from calib.cures.rungs import RUNGS, _walk
from calib.cures.search import find_cure
from calib.cures.smooth import Smoothing
from calib.cures.trials import SEARCH_ROWS, Trial, Trials, search_rows
from calib.errors import GateError, UsageError
from calib.evaluation.interval import Interval
from calib.measurement import Measurement, MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel
from tests.cures.models import build, loud_norms, pairs_of, spiked


@pytest.fixture
def opened(tiny_llama: Path) -> OpenedModel:
    return open_model(tiny_llama, device="cpu")


def rows_file(folder: Path, rows: list[list[int]]) -> Path:
    """Token ids as a source of a corpus."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def blocks(opened: OpenedModel) -> TokenBlocks:
    return build_blocks(["builtin:speeches"], opened.tokenizer, samples=12, max_length=32)


@pytest.fixture
def measurement(opened: OpenedModel, blocks: TokenBlocks) -> Measurement:
    spiked(opened.model)
    return measure(opened, blocks.select(range(8)), MeasureOptions(batch_size=4))


def test_smoothed_ranges_are_those_of_a_new_measurement(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    smoothing = SmoothingSweep(find_pairs(opened.model), measurement).smoothing(0.7)
    predicted = smoothed_ranges(measurement, smoothing)
    with smoothing.apply(opened.model):
        found = measure(opened, blocks.select(range(8)), MeasureOptions(batch_size=4))
    changed = 0
    for name, site in found.sites.items():
        if "linear_input" not in site.kinds:
            continue
        want, got = site.statistics.range, predicted.sites[name].statistics.range
        np.testing.assert_allclose(got.minimum, want.minimum, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(got.maximum, want.maximum, rtol=1e-3, atol=1e-6)
        changed += got.amax != measurement.sites[name].statistics.range.amax
    assert changed >= 4


def test_the_judge_finds_nothing_in_the_float_model_and_something_in_a_changed_one(
    opened: OpenedModel, blocks: TokenBlocks
) -> None:
    judge = Judge(opened.model, blocks.select(range(3)), prefix=[5])
    assert judge.reference_nll is not None
    assert judge.reference_nll.shape == (3, 31)
    same = judge.judge()
    assert same.mean == 0
    ratio = same.ratio(judge.reference_nll)
    assert ratio is not None
    assert ratio.value == 1
    with torch.no_grad():
        opened.model.model.norm.weight *= 1.5
    assert judge.judge().mean > 1e-4


@pytest.mark.parametrize("planted", [True, False])
def test_weights_are_compensated_where_their_rounding_matters(
    planted: bool, opened: OpenedModel, blocks: TokenBlocks
) -> None:
    """Planted channels cost far more than the weights do; without them both cost about the same."""
    if planted:
        spiked(opened.model)
    few = blocks.select(range(8))
    measurement = measure(opened, few, MeasureOptions(batch_size=4))
    options = CureOptions(cures=("compensate",), target=1.0)
    cured = find_cure(opened, measurement, few, blocks.select(range(8, 12)), options)
    assert any("compensate" in row.name for row in cured.rows) != planted
    assert ("rounding the weights costs" in cured.skipped.get("compensate", "")) == planted


def test_an_encoder_is_judged_by_its_outputs_also_behind_a_head_for_masked_words(tiny_bert: Path) -> None:
    opened = open_model(tiny_bert, device="cpu")
    assert type(opened.model).__name__ == "BertForMaskedLM"
    rows = np.random.default_rng(0).integers(5, 50, (6, 32)).tolist()
    blocks = build_blocks([rows_file(tiny_bert, rows)], opened.tokenizer, samples=6, max_length=32)
    measurement = measure(opened, blocks.select(range(4)), MeasureOptions(batch_size=4))
    options = CureOptions(cures=("auto", "resample"), target=1.0)
    cured = find_cure(opened, measurement, blocks.select(range(4)), blocks.select([4, 5]), options)
    assert all(row.ratio is None for row in cured.rows)
    assert {"prefix", "resample", "rotate the residual stream"} <= set(cured.skipped)


def test_a_decoder_that_makes_up_nothing_reads_the_tokens(blocks: TokenBlocks) -> None:
    judge = Judge(build("t5"), blocks.select(range(2)))
    assert judge.reference_nll is not None
    assert judge.reference_nll.shape == (2, blocks.input_ids.shape[1] - 1)
    assert judge.judge().mean == pytest.approx(0, abs=1e-6)


def test_a_judge_gives_up_what_is_clearly_worse_than_a_rival(opened: OpenedModel, blocks: TokenBlocks) -> None:
    judge = Judge(opened.model, blocks.select(range(3)), batch_size=1)
    with torch.no_grad():
        opened.model.model.norm.weight *= 1.5
    whole = judge.judge()
    assert len(judge.judge(whole.divergence * 1.01).divergence) == judge.blocks == 3
    spared = judge.judge(whole.divergence / 2)
    assert len(spared.divergence) == 1
    assert spared.divergence[0] == whole.divergence[0]


@pytest.mark.parametrize(("less", "judged"), [([0.01, 0.011, 0.012, 0], 2), ([0.03, -0.03, 0.01, 0], 4)])
def test_a_judge_gives_up_what_is_a_little_worse_on_every_block(
    less: list[float], judged: int, opened: OpenedModel, blocks: TokenBlocks
) -> None:
    judge = Judge(opened.model, blocks.select(range(4)), batch_size=1)
    with torch.no_grad():
        opened.model.model.norm.weight *= 1.5
    divergence = judge.judge().divergence
    assert len(judge.judge(divergence * (1 - np.array(less))).divergence) == judged


def test_logits_are_compared_in_parts(
    opened: OpenedModel, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = []
    for tokens in (31, 7):
        monkeypatch.setattr("calib.cures.judge._AT_ONCE", 3 * 300 * tokens)
        judge = Judge(opened.model, blocks.select(range(3)))
        with torch.no_grad():
            opened.model.model.norm.weight *= 1.5
        scores.append(judge.judge())
        with torch.no_grad():
            opened.model.model.norm.weight /= 1.5
    np.testing.assert_allclose(scores[0].divergence, scores[1].divergence, rtol=1e-5)
    assert scores[0].nll is not None
    assert scores[1].nll is not None
    np.testing.assert_allclose(scores[0].nll, scores[1].nll, rtol=1e-6)


def test_the_search_measures_a_few_blocks_and_what_is_written_all(opened: OpenedModel, blocks: TokenBlocks) -> None:
    few = measure(opened, search_rows(blocks), MeasureOptions(batch_size=4))
    assert few.corpus.blocks == SEARCH_ROWS < 10
    cured = find_cure(opened, few, blocks.select(range(10)), blocks.select([10, 11]), CureOptions(target=50.0))
    assert cured.measurement.corpus.blocks == 10
    assert cured.scales.corpus == cured.measurement.corpus


def test_a_rotation_stays_in_the_weights_until_the_original_is_needed(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    state = {name: p.detach().clone() for name, p in opened.model.named_parameters()}
    few, held_out = blocks.select(range(8)), blocks.select(range(8, 12))
    trials = Trials(opened, measurement, few, held_out, CureOptions(), lambda line: None)
    rotation = OfflineRotation.find(opened.model, trials.pairs, untie=True)
    plain = Candidate(8, True, measurement, measurement)
    trials.attempt(replace(plain, rotation=rotation))
    assert not torch.equal(opened.model.model.embed_tokens.weight, state["model.embed_tokens.weight"])
    trials.judge("verify", ())  # of the model as it was
    assert all(torch.equal(p, state[name]) for name, p in opened.model.named_parameters())


def test_an_error_leaves_the_model_as_it_was(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: p.detach().clone() for name, p in opened.model.named_parameters()}

    def broken(trials: Trials, best: Trial) -> Trial | None:
        assert not torch.equal(opened.model.model.embed_tokens.weight, state["model.embed_tokens.weight"])
        raise GateError("broken")

    monkeypatch.setitem(RUNGS, "compensate", broken)
    options = CureOptions(cures=("rotate", "compensate"), target=1.0)
    with pytest.raises(GateError, match="broken"):
        find_cure(opened, measurement, blocks.select(range(8)), blocks.select(range(8, 12)), options)
    assert all(torch.equal(p, state[name]) for name, p in opened.model.named_parameters())


def test_the_search_finds_the_smoothing_that_planted_channels_need(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    lines: list[str] = []
    before = opened.model(input_ids=torch.from_numpy(blocks.input_ids[:2])).logits.detach()
    options = CureOptions(cures=("smooth", "compensate"), target=1.0)
    cured = find_cure(
        opened, measurement, blocks.select(range(8)), blocks.select(range(8, 12)), options, say=lines.append
    )
    none, chosen = cured.rows[0], cured.rows[-1]
    assert none.name == "none"
    assert chosen.divergence.value < none.divergence.value / 3
    assert next(cure.kind for cure in cured.scales.cures) == "smooth"
    after = opened.model(input_ids=torch.from_numpy(blocks.input_ids[:2])).logits.detach()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)  # the float function is kept
    with QuantizedModel(opened.model, cured.plan) as quantized:
        opened.model(input_ids=torch.from_numpy(blocks.input_ids[:2]))
    assert not quantized.silent()
    assert cured.scales.measurement_sha256 == cured.measurement.sha256 != measurement.sha256
    assert any(line.startswith("verify smooth") for line in lines)
    assert cured.opened.provenance.parent == opened.provenance.fingerprint == measurement.model.fingerprint
    assert cured.scales.model.fingerprint == cured.opened.provenance.fingerprint != opened.provenance.fingerprint


def test_a_target_that_is_met_at_once_changes_nothing(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    state = {name: p.detach().clone() for name, p in opened.model.named_parameters()}
    cured = find_cure(
        opened, measurement, blocks.select(range(8)), blocks.select(range(8, 12)), CureOptions(target=50.0)
    )
    assert [row.name for row in cured.rows] == ["none"]  # the model as it is written
    assert cured.scales.cures == []
    assert "meets the target" in cured.reason
    assert all(torch.equal(p, state[name]) for name, p in opened.model.named_parameters())


def test_a_value_that_meets_the_target_by_chance_does_not_end_the_search(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Score, "ratio", lambda self, reference: Interval(1.0, 0.9, 1.2))
    few, held_out = blocks.select(range(8)), blocks.select(range(8, 12))
    cured = find_cure(opened, measurement, few, held_out, CureOptions(cures=("smooth",), target=1.1))
    assert len(cured.rows) == 2  # nothing, and smoothing, as it is written
    assert "misses the target of 1.1" in cured.reason
    assert cured.reason.endswith("verified on others: ratio 1.0000 [0.9000, 1.2000]")


def test_layers_are_kept_in_float_where_that_helps_most(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    options = CureOptions(cures=("keep",), target=1.0, keep=2)
    cured = find_cure(opened, measurement, blocks.select(range(8)), blocks.select(range(8, 12)), options)
    kept = next(cure for cure in cured.scales.cures if cure.kind == "keep").settings["modules"]
    assert isinstance(kept, list)
    assert 1 <= len(kept) <= 2
    assert all(str(name).endswith("down_proj") for name in kept)
    assert set(kept) <= set(cured.scales.ignore)
    assert cured.rows[-1].divergence.value < cured.rows[0].divergence.value


def test_a_rotation_of_the_weights_takes_apart_what_norms_make_loud(opened: OpenedModel, blocks: TokenBlocks) -> None:
    loud_norms(opened.model)
    few, rows = blocks.select(range(8)), torch.from_numpy(blocks.input_ids[:2])
    measurement = measure(opened, few, MeasureOptions(batch_size=4))
    before = opened.model(input_ids=rows).logits.detach()
    cured = find_cure(opened, measurement, few, blocks.select(range(8, 12)), CureOptions(cures=("rotate",), target=1.0))
    assert [row.name for row in cured.rows] == ["none", "rotate"]
    assert cured.rows[-1].divergence.value < cured.rows[0].divergence.value / 3
    after = opened.model(input_ids=rows).logits.detach()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)  # the float function is kept
    (record,) = cured.scales.cures
    assert (record.kind, record.needs, record.settings["untied"]) == ("rotate", "nothing", True)


def test_behind_a_rotation_only_what_it_leaves_is_smoothed(opened: OpenedModel, blocks: TokenBlocks) -> None:
    loud_norms(opened.model)
    spiked(opened.model)
    few = blocks.select(range(8))
    measurement = measure(opened, few, MeasureOptions(batch_size=4))
    options = CureOptions(cures=("smooth", "rotate"), target=1.0)
    cured = find_cure(opened, measurement, few, blocks.select(range(8, 12)), options)
    (rotated,) = [row.candidate for row in cured.rows if row.candidate.rotation is not None]
    assert rotated.smoothing is not None
    assert [p.producer.rpartition(".")[2] for p in rotated.smoothing.pairs] == ["up_proj"] * 3


def test_an_online_rotation_says_what_a_consumer_must_do(
    opened: OpenedModel, blocks: TokenBlocks, measurement: Measurement
) -> None:
    before = opened.model(input_ids=torch.from_numpy(blocks.input_ids[:2])).logits.detach()
    options = CureOptions(cures=("rotate-online",), target=1.0)
    cured = find_cure(opened, measurement, blocks.select(range(8)), blocks.select(range(8, 12)), options)
    (record,) = cured.scales.cures
    assert (record.kind, record.needs) == ("rotate", "online-op")
    assert cured.rows[-1].divergence.value < cured.rows[0].divergence.value
    after = opened.model(input_ids=torch.from_numpy(blocks.input_ids[:2])).logits.detach()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_auto_rotates_inputs_of_language_models_only_for_those_are_served_by_programs_that_compute_it(
    opened: OpenedModel, tiny_bert: Path, blocks: TokenBlocks, measurement: Measurement
) -> None:
    few, held_out = blocks.select(range(8)), blocks.select(range(8, 12))
    options = CureOptions(cures=("auto", "keep"))
    found = Trials(opened, measurement, few, held_out, options, lambda line: None).cures
    assert found == ("smooth", "prefix", "rotate", "compensate", "rotate-online", "keep")
    encoder = open_model(tiny_bert, device="cpu")
    texts = build_blocks(["builtin:speeches"], encoder.tokenizer, samples=6, max_length=32)
    of_encoder = measure(encoder, texts.select(range(3)), MeasureOptions())
    trials = Trials(encoder, of_encoder, texts.select(range(3)), texts.select(range(3, 6)), options, lambda line: None)
    assert trials.cures == ("smooth", "prefix", "rotate", "compensate", "keep")


@pytest.mark.parametrize(("target", "tried"), [(0.0, [3, 4, 5, 6, 7]), (0.45, [3, 4, 5]), (0.8, [3])])
def test_alphas_are_walked_only_while_that_helps_and_the_target_is_missed(target: float, tried: list[int]) -> None:
    seen: list[int] = []

    def at(alpha: float, rival: object) -> SimpleNamespace:
        seen.append(round(10 * alpha))
        return SimpleNamespace(worth=abs(alpha - 0.6) + 0.4, given_up=False)

    trials = SimpleNamespace(met=lambda trial: trial.worth < target + 0.1)
    best: Any = _walk(trials, at, 0.3)  # type: ignore[arg-type]
    assert seen == tried
    assert best.worth == pytest.approx(min(abs(alpha / 10 - 0.6) for alpha in tried) + 0.4)


def test_a_prefix_outside_of_the_vocabulary_is_refused(opened: OpenedModel, blocks: TokenBlocks) -> None:
    with pytest.raises(UsageError, match="token 999999 is outside of the vocabulary"):
        find_prefixes(opened, blocks, candidates=[999999])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"cures": ("polish",)}, "--cure polish: unknown"), ({"target": 0.5}, "--target 0.5")],
)
def test_bad_options_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CureOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "judged"), [("falcon", 1), ("llama", 3)])
def test_a_rotation_that_no_pair_ends_in_is_judged_once(
    name: str, judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def attempt(candidate: Candidate, rival: Trial | None = None) -> Trial:
        attempts.append(candidate)
        return Trial(candidate, Score(np.array([1.0]), None), None)

    pairs: Any = tuple(pairs_of(name))
    none: Any = None
    smoothing = Smoothing(pairs, (0.8,) * len(pairs), ())
    start = Candidate(8, symmetric=True, measurement=none, ranges=none, smoothing=smoothing)
    trials: Any = SimpleNamespace(model=build(name), attempt=attempt, ranges=lambda one: None, met=lambda trial: False)
    monkeypatch.setattr("calib.cures.rungs._smoothed", lambda trials, base, alphas: base)
    RUNGS["rotate-online"](trials, Trial(start, Score(np.array([1.0]), None), None))
    assert len(attempts) == judged


@pytest.mark.parametrize(
    ("length", "said"), [(64, "no sink that one takes"), (512, "smaller --max-length leaves room")]
)
def test_why_no_prefix_was_tried_is_said(
    tiny_gpt2: Path, length: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(tiny_gpt2, device="cpu")  # learned 512 positions
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=1, max_length=length)
    monkeypatch.setattr("calib.cures.rungs.find_prefixes", lambda opened, blocks: [])
    trials: Any = SimpleNamespace(opened=opened, model=opened.model, blocks=blocks, predicts=True, skipped={})
    best: Any = None
    assert RUNGS["prefix"](trials, best) is None
    assert said in trials.skipped["prefix"]


def test_every_rung_runs_a_decoder_that_makes_up_nothing(blocks: TokenBlocks, tiny_llama: Path) -> None:
    opened = replace(open_model(tiny_llama, device="cpu"), model=build("t5"))
    few = blocks.rewritten(blocks.input_ids % 300, "within the vocabulary")
    measurement = measure(opened, few.select(range(8)), MeasureOptions(batch_size=4))
    options = CureOptions(cures=("prefix", "resample", "compensate"), bits=4, target=1.0)
    cured = find_cure(opened, measurement, few.select(range(8)), few.select(range(8, 12)), options)
    assert any(row.name.endswith("compensate") for row in cured.rows)
    assert "resample" not in cured.skipped
    assert cured.candidate.prefix is None  # which no encoder could hold
    assert "encoder reads without a cache" in cured.skipped["prefix"]
